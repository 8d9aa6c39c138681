"""Parts of controls and horizons, the frozen advantages, and the choice among the teacher's answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from objective_cases import evaluate, make_columns, make_world, objective, recipe, view_of

from lightopd.errors import CacheError
from lightopd.objectives.parts.best_of import overlaps
from lightopd.objectives.preparation.prepare import prepare_rollouts
from lightopd.objectives.preparation.serving import CacheFacts, missing

BEST = {"select": ["best_of"]}


def test_shuffled_advantages_have_the_sums_of_the_rollouts_and_other_places():
    world = make_world(2)
    _, plain_NV, plain = evaluate(objective(target="log_ratio"), world)
    _, shuffled_NV, shuffled = evaluate(objective(target="log_ratio", advantage=["shuffle"]), world)
    reseeded = objective(target="log_ratio", advantage=[{"kind": "shuffle", "seed": 1}])
    _, other_NV, _ = evaluate(reseeded, world)
    assert shuffled["advantage"] == pytest.approx(plain["advantage"], abs=1e-9)
    assert not torch.allclose(shuffled_NV, plain_NV)
    assert not torch.allclose(shuffled_NV, other_NV)


@pytest.mark.parametrize(
    ("limit", "trained"), [({"tokens": 2}, 2), ({"share": 0.5}, 3), ({"share": 0.01}, 1)]
)
def test_a_horizon_trains_the_first_tokens_of_a_rollout_alone(limit, trained):
    world = make_world(2)
    config = objective(target={"kind": "divergence"}, token_weights=[{"kind": "horizon", **limit}])
    _, gradient_NV, _ = evaluate(config, world)
    row = 4  # six tokens, of which one is not trained
    tokens = world.tokens(row)
    assert len(tokens) in (5, 6)
    moved = [n for n in range(len(world.row_N)) if world.row_N[n] == row and gradient_NV[n].abs().max() > 0]
    assert moved == tokens[:trained]


@pytest.mark.parametrize("limits", [{}, {"tokens": 2, "share": 0.5}])
def test_a_horizon_has_exactly_one_limit(limits):
    with pytest.raises(ValueError, match="one of share and tokens"):
        objective(token_weights=[{"kind": "horizon", **limits}])


@pytest.mark.parametrize("target", ["signal_ratio", "constant"])
def test_an_advantage_without_the_student_needs_a_clip_that_ends_it(target):
    with pytest.raises(ValueError, match=f"target {target}, so nothing ends its training; add .* ppo_clip"):
        objective(target=target)
    objective(target=target, token_weights=["ppo_clip"])


def test_a_constant_advantage_of_zero_trains_nothing_and_is_refused():
    with pytest.raises(ValueError, match="an advantage of 0 trains nothing"):
        objective(target={"kind": "constant", "value": 0}, token_weights=["ppo_clip"])


def answers(correct, overlap_of_first):
    """One prompt with two answers of the teacher and a rollout of the student; the first answer's top-k has
    `overlap_of_first` of the student's two ids, the second's has one."""
    world = make_world(0)
    rows = [0, 0, 0]
    one = view_of(world, rows)
    tables = {name: np.zeros((12, 4)) for name in ("teacher", "rollout_student")}
    tables["rollout_student"][:, :2] = 2
    tables["teacher"][:4, [[2, 3], [0, 2], [0, 1]][overlap_of_first]] = 2
    tables["teacher"][4:8, [0, 3]] = 2
    return make_columns(
        rollout_ids=["b", "a", "c"],
        groups_R=np.zeros(3, np.int64),
        rewards_R=np.array([*correct, 0.0], np.float32),
        origins=["teacher", "teacher", "student"],
        domains=[None] * 3,
        offsets=np.array([0, 4, 8, 12]),
        loss_mask_N=np.ones(12, bool),
        logprobs_N=one.logprobs_N[:12],
        signals={name: np.zeros(12) for name in tables},
        tables=tables,
        teacher_rewards_R=None,
    )


@pytest.mark.parametrize(
    ("correct", "overlap_of_first", "kept"),
    [((0, 1), 2, "a"), ((1, 0), 0, "b"), ((1, 1), 2, "b"), ((1, 1), 0, "a"), ((0, 0), 1, "a")],
)
def test_the_best_answer_is_correct_then_most_like_the_student_then_first_by_id(
    correct, overlap_of_first, kept
):
    config = objective(select=[{"kind": "best_of", "top_k": 2}])
    view = answers(correct, overlap_of_first)
    keep_R = prepare_rollouts(config, [view]).keep_R
    assert [name for name, is_kept in zip(view.rollout_ids, keep_R, strict=True) if is_kept] == sorted(
        [kept, "c"], key=view.rollout_ids.index
    )


def test_choosing_among_answers_of_a_cache_without_any_says_how_to_make_one():
    view = replace(answers((1, 1), 1), origins=["student"] * 3)
    with pytest.raises(CacheError, match="this cache has none; make it with `lightopd join"):
        prepare_rollouts(objective(**BEST), [view])


def test_overlap_counts_common_ids_over_the_shorter_list():
    one = np.array([[1, 2, -1], [1, 2, 3], [-1, -1, -1]])
    other = np.array([[2, 5, 7], [3, 1, 2], [1, 2, 3]])
    assert overlaps(one, other).tolist() == [0.5, 1.0, 0.0]


def test_a_confidence_that_was_not_stated_is_refused_by_name_and_rollout():
    world = make_world(0)
    view = view_of(world, range(world.size))
    numbers = {name: values.copy() for name, values in view.text_values_R.items()}
    numbers["second_confidence"][[3, 5]] = np.nan
    with pytest.raises(CacheError, match=r"second_confidence has no number for 2 rollouts, .* rollout-3"):
        prepare_rollouts(recipe("mad_opd"), [replace(view, text_values_R=numbers)])


def test_a_cache_without_the_texts_of_an_objective_says_how_to_make_them():
    facts = CacheFacts("CACHE", {"teacher": 8, "second_teacher": 8}, frozenset(), frozenset({"confidence"}))
    (line,) = missing(recipe("mad_opd"), facts)
    assert line.startswith("no text second_confidence; add it: lightopd rewrite --cache CACHE")
