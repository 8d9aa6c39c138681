"""Signals scored on the student's own top-k ids, with the model's own beside them or not."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from engine_cases import random_sequences
from fake_engine import FakeEngine
from transformers import AutoModelForCausalLM

from lightopd.cache.manifests import signal_folder
from lightopd.cache.shards import shard_path
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.engines.base import keep_ids_below
from lightopd.errors import CacheError, ConfigError, LineageError, OutputError
from lightopd.pipelines import precompute
from lightopd.pipelines.caches.rescore import rescore
from lightopd.pipelines.shared.sequences import read_sequences
from lightopd.schemas.records import Sequence, Support


@pytest.fixture
def cache(world, tmp_path):
    """The world's cache with the student's own top 3 at every position."""
    shutil.copytree(world.cache, tmp_path / "cache")
    score(tmp_path / "cache", world.sft / "student", "rollout_student", 3, role="reference")
    return tmp_path / "cache"


def score(cache, model, signal, top_k, *sets, **flags):
    asked = {"cache": cache, "teacher": model, "signal": signal, "top_k": top_k, **flags}
    return precompute.run(load_stage("precompute", [], list(sets), asked))


def rows_of(cache, signal):
    return pq.read_table(shard_path(signal_folder(cache, signal), 0)).to_pylist()


def entries(row):
    """Ids and log-probabilities at each position."""
    ends = np.cumsum(row["topk_counts"])[:-1]
    return list(zip(np.split(row["topk_ids"], ends), np.split(row["topk_logprobs"], ends), strict=True))


@pytest.mark.parametrize(("support", "top_k"), [("student", 4), ("both", 0), ("both", 4)])
def test_entries_are_the_teachers_float64_logprobs_of_the_students_ids(world, cache, support, top_k):
    score(cache, world.teacher, "on_student", top_k, support=support, topk_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float64)
    sequences = read_sequences(open_cache(cache), 0)[1]
    student, found = rows_of(cache, "rollout_student"), rows_of(cache, "on_student")
    for row in range(4):
        ids = torch.tensor(np.concatenate([sequences[row].prompt_ids, sequences[row].response_ids])).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(sequences[row].prompt_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).numpy()
        places = zip(entries(student[row]), entries(found[row]), found[row]["tail_logprobs"], strict=True)
        for position, ((wanted, _), (ids_found, values), tail) in enumerate(places):
            own = np.argsort(-logprobs[position])[: top_k if support == "both" else 0]
            assert set(ids_found) == set(wanted) | set(own)
            assert list(values) == sorted(values, reverse=True)
            np.testing.assert_allclose(values, logprobs[position][ids_found], atol=2e-5)
            outside = np.delete(np.exp(logprobs[position]), ids_found).sum()
            np.testing.assert_allclose(np.exp(tail), outside, atol=2e-5)


def test_such_a_signal_verifies_rescores_and_says_whose_ids_it_has(world, cache):
    score(cache, world.teacher, "on_student", 4, support="both")
    assert verify(cache) == []
    assert rescore(cache, "on_student", 6)[1]
    manifest = open_cache(cache).signals["on_student"].manifest
    assert manifest.top_k == 7
    assert manifest.support["signal"] == "rollout_student"


def test_a_run_that_goes_on_gives_the_same_bytes_and_refuses_another_support(world, cache):
    score(cache, world.teacher, "on_student", 4, support="both")
    folder = signal_folder(cache, "on_student")
    before = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    for path in list(folder.glob("part-00001*")):
        path.unlink()
    score(cache, world.teacher, "on_student", 4, support="both")
    assert {path.name: path.read_bytes() for path in folder.glob("part-*")} == before
    with pytest.raises(OutputError, match=r"support"):
        score(cache, world.teacher, "on_student", 4, support="student")


def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(world, cache):
    for engine in ("vllm", "server"):
        more = ["engine.urls=http://127.0.0.1:9"] if engine == "server" else []
        with pytest.raises(ConfigError, match="cannot give"):
            score(cache, world.teacher, "other", 4, f"engine.kind={engine}", *more, support="student")
    with pytest.raises(CacheError, match="no signal 'nobody'"):
        score(cache, world.teacher, "other", 4, support="student", support_signal="nobody")
    score(cache, world.sft / "student", "sampled_only", 0, role="reference")
    with pytest.raises(ConfigError, match="has no top-k"):
        score(cache, world.teacher, "other", 4, support="student", support_signal="sampled_only")


def test_the_fake_engine_knows_the_same_support():
    engine = FakeEngine(vocabulary_size=9)
    ids = np.array([3, 4, 5], dtype=np.int32)
    support = Support(np.array([1, 2, 0], dtype=np.int32), np.array([8, 0, 8], dtype=np.int32))
    (found,) = engine.score([Sequence(ids, ids, support)], 0)
    (whole,) = engine.score([Sequence(ids, ids)], 9)
    assert found.topk_counts.tolist() == [1, 2, 0]
    by_id = [
        dict(zip(i, v, strict=True))
        for i, v in (
            (whole.topk_ids[9 * r : 9 * r + 9], whole.topk_logprobs[9 * r : 9 * r + 9]) for r in range(3)
        )
    ]
    assert found.topk_logprobs[0] == by_id[0][8]
    assert set(found.topk_ids[1:]) == {0, 8}
    assert found.tail_logprobs[2] == pytest.approx(0, abs=1e-6)


def test_ids_of_another_model_than_the_student_are_refused(world, cache):
    with pytest.raises(LineageError, match="sampled"):
        score(cache, world.teacher, "other", 4, support="student", support_signal="teacher")


def test_a_dry_run_counts_the_students_entries_too(world, cache):
    asked = {"cache": cache, "teacher": world.teacher, "signal": "other", "top_k": 4, "support": "both"}
    config = load_stage("precompute", [], [], asked)
    given = precompute.run(config, dry_run=True, tokens_per_s=100.0)
    assert given.figures["bytes_per_token"] == 12 + 7 * 6
    assert precompute.run(config, dry_run=True).figures["tokens_per_s"] > 0


def test_ids_beyond_a_students_outputs_go_to_the_tail_with_their_mass():
    engine = FakeEngine(vocabulary_size=24, seed=2)
    sequences = random_sequences(0, [(3, 7), (2, 5)], 16)
    whole, wide = engine.score(sequences, 24), engine.score(sequences, 6)
    for every, scores in zip(whole, wide, strict=True):
        kept = keep_ids_below(scores, 16)
        assert (kept.topk_ids < 16).all()
        np.testing.assert_array_equal(kept.logprobs, scores.logprobs)
        ends = np.cumsum(kept.topk_counts)[:-1]
        rows = zip(np.split(kept.topk_ids, ends), np.split(kept.topk_logprobs, ends), strict=True)
        for place, (ids, logprobs) in enumerate(rows):
            own = slice(24 * place, 24 * place + 24)
            outside = ~np.isin(every.topk_ids[own], ids)
            mass = np.log(np.exp(every.topk_logprobs[own][outside].astype(np.float64)).sum())
            assert kept.tail_logprobs[place] == pytest.approx(mass, abs=1e-5)
            assert (np.diff(logprobs) <= 0).all()
    assert sum(len(a.topk_ids) for a in wide) > sum(len(keep_ids_below(a, 16).topk_ids) for a in wide)
    assert keep_ids_below(wide[0], 24) is wide[0]
