"""Overlap of two top-k: the measure and the named query against sets, position by position, in float64."""

from itertools import chain
from math import exp

import numpy as np
import pytest
from cache_cases import STUDENT, make_cache

from lightopd.cache.signals.overlap import measured_overlap
from lightopd.cache.store import open_cache
from lightopd.inspection import opened
from lightopd.pipelines.shared.scoring.overlap import overlap_note, student_overlap

SIGNALS = {
    "teacher": {"topk_dtype": "float32"},
    "self": {"role": "self", "model": STUDENT, "top_k": 6, "topk_dtype": "float32"},
}


def places(rollouts, scores, top_k):
    """(quarter, share, teacher's mass, student's mass) of every trained token, by sets."""
    flat = [list(chain.from_iterable(shards)) for shards in (rollouts, scores["teacher"], scores["self"])]
    for rollout, one, other in zip(*flat, strict=True):
        ends = [np.concatenate([[0], np.cumsum(each.topk_counts)]) for each in (one, other)]
        for place in range(len(rollout.response_ids)):
            if not rollout.loss_mask[place]:
                continue
            sides = [
                dict(
                    zip(
                        each.topk_ids[end[place] : end[place + 1]][:top_k],
                        each.topk_logprobs[end[place] : end[place + 1]][:top_k],
                        strict=True,
                    )
                )
                for each, end in zip((one, other), ends, strict=True)
            ]
            common = sides[0].keys() & sides[1].keys()
            masses = [sum(exp(float(side[token])) for token in common) for side in sides]
            yield 4 * place // len(rollout.response_ids), len(common) / min(map(len, sides)), *masses


@pytest.mark.parametrize("changes", [{}, {"teacher": {"min_probability": 0.1}}], ids=["fixed", "threshold"])
def test_the_overlap_is_that_of_the_sets_at_every_trained_token(changes, tmp_path):
    signals = {name: {**settings, **changes.get(name, {})} for name, settings in SIGNALS.items()}
    cache, rollouts, scores = make_cache(tmp_path, signals=signals)
    found = measured_overlap(cache, "teacher", "self", list(cache.shards))
    expected = np.array(list(places(rollouts, scores, 4)))
    assert found.top_k == 4
    np.testing.assert_allclose(found[1:4], expected[:, 1:].mean(0), rtol=1e-6)
    by_quarter = [expected[expected[:, 0] == quarter, 1].mean() for quarter in range(4)]
    np.testing.assert_allclose(found.quarters, by_quarter, rtol=1e-12)


def test_the_named_query_gives_the_same_numbers(tmp_path):
    cache, _, _ = make_cache(tmp_path, signals=SIGNALS)
    found = measured_overlap(cache, "teacher", "self", list(cache.shards))
    everywhere, *quarters = opened.open_cache(tmp_path).query("overlap", k=4).rows()
    masses = (everywhere["mass_other"], everywhere["mass_one"])  # `self` is before `teacher`
    assert everywhere["mean_overlap"] == pytest.approx(found.share, abs=1e-4)
    assert masses == pytest.approx((found.teacher_mass, found.student_mass), abs=1e-4)
    assert [row["mean_overlap"] for row in quarters] == pytest.approx(found.quarters, abs=1e-4)


def test_either_signal_finds_the_other_and_the_teacher_is_the_teacher(tmp_path):
    make_cache(tmp_path, signals=SIGNALS)
    found = [student_overlap(open_cache(tmp_path, signals=[name]), name) for name in SIGNALS]
    assert found[0] == found[1] is not None
    assert "of the top-4 of teacher and student" in overlap_note(found[0])


def test_there_is_no_overlap_without_a_top_k_of_the_student(tmp_path):
    make_cache(tmp_path, signals={"teacher": {}, "self": {"role": "self", "model": STUDENT, "top_k": 0}})
    assert student_overlap(open_cache(tmp_path, signals=["teacher"]), "teacher") is None
