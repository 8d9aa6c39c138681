"""What is decided from the whole cache: rewards, margins, weights, selections, guards, refusals."""

from dataclasses import replace

import numpy as np
import pytest
from objective_cases import World, make_columns, make_world, objective, recipe, signals_of, view_of

from lightopd.cache.reader import ShardColumns
from lightopd.errors import CacheError
from lightopd.objectives.parts.extrapolation_limit import critical_factor
from lightopd.objectives.parts.selections import choose_by_lead, gaussian_weights
from lightopd.objectives.preparation.prepare import PreparedRollouts, prepare_rollouts
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.objectives.weights import TeacherValidatedSelection

PLAIN = {"kind": "log_ratio", "clip": None}


def cache(
    scores: list[float],
    rewards: list[float],
    groups: list[int],
    *,
    negative: list[float] | None = None,
    origins: list[str] | None = None,
    teacher_rewards: list[float] | None = None,
) -> ShardColumns:
    """Rollouts of two tokens whose mean log T - log s at rollout is the score."""
    number = len(scores)
    teacher_N = np.repeat(np.array(scores, np.float32) - 10, 2) + np.tile([0.5, -0.5], number)
    other_N = teacher_N if negative is None else np.repeat(np.array(negative, np.float32) - 10, 2)
    return make_columns(
        rollout_ids=[f"r{place}" for place in range(number)],
        groups_R=np.array(groups),
        rewards_R=np.array(rewards, np.float32),
        origins=origins or ["student"] * number,
        domains=[None] * number,
        offsets=np.arange(number + 1) * 2,
        loss_mask_N=np.ones(2 * number, bool),
        logprobs_N=np.full(2 * number, -10, np.float32),
        signals={"teacher": teacher_N, "reference": other_N, "negative": other_N},
        teacher_rewards_R=None if teacher_rewards is None else np.array(teacher_rewards, np.float32),
    )


def column(config: ObjectiveConfig, view: ShardColumns, name: str) -> list[float]:
    return [float(value) for value in prepare_rollouts(config, [view]).columns[name]]


def test_group_rewards_are_standardised_by_the_unbiased_deviation():
    view = cache([0] * 5, [1, 0, 0, 1, 1], [1, 1, 1, 2, 2])
    found = column(objective(target="reward"), view, "main/reward")
    third = (1 / 3) ** 0.5
    assert found == pytest.approx([2 / 3 / third, -1 / 3 / third, -1 / 3 / third, 0, 0], abs=1e-5)


def test_a_group_of_one_has_the_reward_zero_beside_groups_that_are_compared():
    """verl gives a lone rollout its plain reward, 1 here; offline it would be pushed for being alone."""
    view = cache([0] * 4, [1, 0, 1, 0], [1, 1, 2, 3])
    shifted = {"target": "log_ratio", "advantage": [{"kind": "group_reward"}]}
    for parts in ({"target": "reward"}, shifted):
        name = "main/reward" if parts == {"target": "reward"} else "main/group_reward"
        half = 0.5**0.5
        assert column(objective(**parts), view, name) == pytest.approx([half, -half, 0, 0], abs=1e-5)


def test_group_rewards_sum_to_zero_and_missing_ones_are_zero():
    view = cache([0] * 4, [1, float("nan"), 0, 0.5], [1, 1, 1, 1])
    found = column(objective(target="reward"), view, "main/reward")
    assert found[1] == 0
    assert sum(found) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("direction", "moved"),
    [("both", [0.35, -0.35]), ("correct_up", [0.7, 0]), ("incorrect_down", [0, -0.7])],
)
def test_a_margin_shift_opens_exactly_the_missing_gap(direction, moved):
    config = objective(target=PLAIN, advantage=[{"kind": "margin", "delta": 0.4, "direction": direction}])
    found = column(config, cache([-0.1, 0.2], [1, 0], [1, 1]), "main/margin")
    assert found == pytest.approx(moved, abs=1e-6)


def test_a_margin_that_is_there_and_groups_of_one_outcome_stay_as_they_are():
    view = cache([1.0, 0.2, 0.3, 0.9], [1, 0, 1, 1], [1, 1, 2, 2])
    config = objective(target=PLAIN, advantage=["margin"])
    assert column(config, view, "main/margin") == [0, 0, 0, 0]


def test_a_margin_can_be_global_and_measured_at_the_extremes():
    view = cache([0.5, 0.1, 0.3, 0.2], [1, 1, 0, 0], [1, 2, 1, 2])
    for scope, gap, missing in (("global", "mean", 0.35), ("global", "min_max", 0.6)):
        part = {"kind": "margin", "scope": scope, "gap": gap, "delta": 0.4}
        found = column(objective(target=PLAIN, advantage=[part]), view, "main/margin")
        assert found == pytest.approx([missing / 2, missing / 2, -missing / 2, -missing / 2], abs=1e-6)


def test_perplexity_weights_have_mean_one_and_favour_the_side_asked_for():
    view = cache([0.0, -1.0, 0.0], [1, 1, 0], [1, 1, 1])
    for favour, larger in (("high", 1), ("low", 0)):
        part = {"kind": "perplexity", "of": "teacher", "favour": favour}
        config = objective(target=PLAIN, rows="correct", rollout_weights=[part])
        found = column(config, view, "main/weight")
        assert sum(found) == pytest.approx(2, abs=1e-6)
        assert np.argmax(found) == larger
        assert max(found) == pytest.approx(2 * np.e / (1 + np.e), abs=1e-6)
        assert found[2] == 0


EMPTY = (
    ({"advantage": [{"kind": "margin", "delta": 0.4}]}, "main/margin"),
    ({"rollout_weights": [{"kind": "perplexity", "of": "teacher"}]}, "main/weight"),
    ({"rollout_weights": [{"kind": "contrast"}]}, "main/weight"),
    ({"rollout_weights": [{"kind": "perplexity"}], "rows": "correct", "average_over": "rows"}, "main/weight"),
)


@pytest.mark.parametrize(("keys", "name"), EMPTY)
def test_a_rollout_without_a_trained_token_does_not_enter_group_statistics(keys, name):
    view = cache([0.1, 0.3, -2.0, 0.2], [1, 0, 1, 1], [1] * 4, negative=[0.0, 0.1, 0.2, 0.3])
    mask_N = view.loss_mask_N.copy()
    mask_N[4:6] = False
    without = cache([0.1, 0.3, 0.2], [1, 0, 1], [1] * 3, negative=[0.0, 0.1, 0.3])
    config = objective(target=PLAIN, **keys)
    found = column(config, replace(view, loss_mask_N=mask_N), name)
    assert [found[row] for row in (0, 1, 3)] == pytest.approx(column(config, without, name), abs=1e-6)
    assert found[2] == 0


def test_the_greedy_mask_does_not_compare_rollouts_without_a_trained_token():
    view = cache([0.0, 1.0, 0.9, 0.2, -9.0], [1, 1, 0, 0, 1], [1] * 5)
    mask_N = view.loss_mask_N.copy()
    mask_N[8:10] = False
    config = objective(target=PLAIN, select=[{"kind": "margin", "delta": 0.4}])
    assert kept(config, replace(view, loss_mask_N=mask_N)) == [1, 2, 3, 4]


def test_perplexity_weights_are_equal_at_a_large_tau():
    config = objective(target=PLAIN, rollout_weights=[{"kind": "perplexity", "of": "teacher", "tau": 1e9}])
    assert column(config, cache([0.0, -3.0], [1, 1], [1, 1]), "main/weight") == pytest.approx([1, 1])


def test_contrast_weights_follow_the_standardised_gain_and_are_clipped():
    view = cache([1.0, 0.0, 0.0, 0.0], [1] * 4, [1] * 4, negative=[0.0] * 4)
    part = {"kind": "contrast", "alpha": 0.5, "high": 1.5}
    found = column(objective(target=PLAIN, rollout_weights=[part]), view, "main/weight")
    low = 1 - 0.5 / 3**0.5
    assert found == pytest.approx([1.5, low, low, low], abs=1e-4)


def test_medium_prompts_weigh_more_at_mean_one():
    config = objective(target=PLAIN, rollout_weights=[{"kind": "difficulty", "factor": 3.0}])
    found = column(config, cache([0] * 4, [1, 0, 1, 1], [1, 1, 2, 2]), "main/weight")
    assert found == pytest.approx([1.5, 1.5, 0.5, 0.5])


def test_the_mean_of_difficulty_weights_is_over_the_rollouts_that_the_term_sees():
    weights = [{"kind": "difficulty", "factor": 3.0}]
    config = objective(target="mle", rows="correct", rollout_weights=weights)
    found = column(config, cache([0] * 6, [1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 2, 2]), "main/weight")
    assert found == pytest.approx([9 / 5, 0, 0, 0, 3 / 5, 3 / 5])


def test_a_mean_over_rows_scales_by_the_share_of_the_cache():
    view = cache([0] * 4, [1] * 4, [1] * 4, origins=["teacher", "student", "student", "student"])
    config = objective(target="mle", rows="teacher", average_over="rows")
    assert column(config, view, "main/weight") == [4, 0, 0, 0]


def kept(config: ObjectiveConfig, view: ShardColumns) -> list[int]:
    return np.flatnonzero(prepare_rollouts(config, [view]).keep_R).tolist()


def test_the_greedy_mask_drops_what_opens_the_gap_most_until_it_is_there():
    """Correct 0.0 and 1.0, incorrect 0.9 and 0.2: dropping the 0.0 opens a gap of 0.45."""
    view = cache([0.0, 1.0, 0.9, 0.2], [1, 1, 0, 0], [1] * 4)
    for delta, rows in ((0.4, [1, 2, 3]), (0.7, [1, 3])):
        selection = {"kind": "margin", "delta": delta}
        assert kept(objective(target=PLAIN, select=[selection]), view) == rows


@pytest.mark.parametrize(("least", "numbers"), [(0.25, (1, 1)), (0.5, (3, 1)), (0.99, (5, 1))])
def test_the_greedy_mask_keeps_its_share_of_each_outcome_and_one_rollout(least, numbers):
    """max(1, floor(min_kept n)) of six correct and two incorrect rollouts."""
    view = cache([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.8], [1] * 6 + [0] * 2, [1] * 8)
    selection = {"kind": "margin", "delta": 5.0, "min_kept": least}
    rows = kept(objective(target=PLAIN, select=[selection]), view)
    assert (sum(row < 6 for row in rows), sum(row >= 6 for row in rows)) == numbers


def test_balance_drops_the_excess_by_id_whatever_the_order():
    view = cache([0] * 6, [1, 1, 1, 1, 0, 0], [1] * 6)
    config = objective(target=PLAIN, select=["balance_outcomes"])
    first = kept(config, view)
    assert len(first) == 4
    assert {4, 5} <= set(first)
    turned = replace(
        view, rollout_ids=list(reversed(view.rollout_ids)), rewards_R=view.rewards_R[::-1].copy()
    )
    assert {view.rollout_ids[row] for row in first} == {
        turned.rollout_ids[row] for row in kept(config, turned)
    }


def test_pass_rate_keeps_partly_solved_prompts():
    view = cache([0] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 3, 3])
    assert kept(objective(target=PLAIN, select=["pass_rate"]), view) == [2, 3]


def tvdf(**keys: object) -> dict[str, object]:
    return {"kind": "teacher_validated", "answers": "answers", **keys}


def test_teacher_validated_prompts_are_those_with_the_largest_lead():
    view = cache([0] * 4, [0.9, 0.5, 0.0, 0.0], [1, 2, 3, 4], teacher_rewards=[1.0, 1.0, 1.0, 0.2])
    config = objective(target=PLAIN, select=[tvdf(prompts=2)])
    assert kept(config, view) == [1, 2]


def test_a_prompt_the_teacher_does_not_solve_never_appears():
    view = cache([0] * 4, [0] * 4, [1, 2, 3, 4], teacher_rewards=[1.0, 0.4, float("nan"), 0.5])
    assert kept(objective(target=PLAIN, select=[tvdf()]), view) == [0, 3]


@pytest.mark.parametrize("sampler", ["top", "stride", "buckets", "gaussian"])
def test_samplers_give_the_number_asked_for_without_repetition(sampler):
    config = TeacherValidatedSelection.model_validate(tvdf(sampler=sampler, prompts=7))
    lead = np.linspace(-0.5, 1.0, 40)
    chosen = choose_by_lead(config, lead)
    assert len(chosen) == len(set(chosen.tolist())) == 7
    if sampler == "top":
        np.testing.assert_array_equal(np.sort(chosen), np.arange(33, 40))
    if sampler == "buckets":
        counts = np.bincount(np.digitize(lead[chosen], np.linspace(-0.5, 1.0, 6)[1:-1]), minlength=5)
        assert counts.max() - counts.min() <= 1


def test_the_order_by_lead_does_not_see_a_constant_and_gaussian_weights_sum_to_one():
    config = TeacherValidatedSelection.model_validate(tvdf(prompts=3))
    lead = np.array([0.3, 0.9, 0.1, 0.5])
    np.testing.assert_array_equal(choose_by_lead(config, lead), choose_by_lead(config, lead + 5))
    assert gaussian_weights(config, lead).sum() == pytest.approx(1)
    assert gaussian_weights(config, lead).argmax() == 1


def test_selections_follow_one_another_and_columns_cover_what_is_kept():
    view = cache([0] * 6, [1, 0, 1, 1, 1, 0], [1, 1, 2, 2, 3, 3])
    config = objective(target=PLAIN, select=["pass_rate", "balance_outcomes"], rollout_weights=["difficulty"])
    found = prepare_rollouts(config, [view])
    assert found.keep_R.tolist() == [True, True, False, False, True, True]
    assert found.columns["main/weight"].tolist() == [1, 1, 0, 0, 1, 1]
    assert found.notes[0] == "selection pass_rate dropped 2 rollouts, 4 are left"


def columns_of(prepared: PreparedRollouts, world: World, order: list[int]) -> dict[str, dict[str, float]]:
    names = [world.names[row] for row in order]
    keep = dict(zip(names, prepared.keep_R.tolist(), strict=True))
    return {"keep": keep} | {
        name: dict(zip(names, column.tolist(), strict=True)) for name, column in prepared.columns.items()
    }


@pytest.mark.parametrize(
    "name", ["uni_opd", "uni_opd_mask", "scope", "sod", "v_zero", "soda", "raft", "video_opd"]
)
def test_neither_shards_nor_the_order_of_rollouts_change_a_column(name):
    world, order = make_world(3), [5, 0, 7, 2, 1, 6, 3, 4]
    whole = columns_of(
        prepare_rollouts(recipe(name), [view_of(world, list(range(8)))]), world, list(range(8))
    )
    pieces = [view_of(world, order[:3]), view_of(world, order[3:4]), view_of(world, order[4:])]
    cut = columns_of(prepare_rollouts(recipe(name), pieces), world, order)
    assert whole.keys() == cut.keys()
    for key, column in whole.items():
        assert cut[key] == pytest.approx(column, abs=1e-6)


def test_the_inferred_limit_gives_the_reported_value_and_its_limits():
    assert critical_factor(0.9993, 0.5, 5.0) == pytest.approx(1.22, abs=0.005)
    assert critical_factor(0.99, 0.989999, 5.0) > 1e4
    assert critical_factor(0.99, 0.995, 5.0) == np.inf
    assert critical_factor(0.99, 0.5, 1 + 1e-9) == pytest.approx(1, abs=1e-6)


def guarded(factor: float, action: str = "refuse") -> ObjectiveConfig:
    guard = {"action": action, "max_share": 0.1}
    return objective(target=PLAIN, extrapolate={"factor": factor, "guard": guard})


def deterministic(base: float) -> ShardColumns:
    """Every token has probability 0.9993 under the teacher and `base` under the reference."""
    view = cache([0.0, 0.0], [1, 1], [1, 1])
    table = {"teacher": np.full(4, np.log(0.9993)), "reference": np.full(4, np.log(base))}
    return replace(
        view, signals=signals_of({name: values.astype(np.float32) for name, values in table.items()})
    )


def test_the_guard_refuses_a_factor_above_the_limit_and_passes_one_below():
    assert prepare_rollouts(guarded(1.2), [deterministic(0.5)]).notes == (
        "term main: factor 1.2 lies above the inferred limit at 0.00% of 4 near-deterministic tokens",
    )
    with pytest.raises(CacheError, match=r"factor 1.25 lies above .* 100.00% of 4 .* lower the factor"):
        prepare_rollouts(guarded(1.25), [deterministic(0.5)])
    assert "100.00%" in prepare_rollouts(guarded(1.25, "warn"), [deterministic(0.5)]).notes[0]
    assert "0.00%" in prepare_rollouts(guarded(1.25), [deterministic(0.99)]).notes[0]


@pytest.mark.parametrize(("outside", "refused"), [(0.2, True), (0.001, False)])
def test_an_extrapolation_by_distance_refuses_supports_that_leave_out_too_much(outside, refused):
    view = cache([0.0, 0.0], [1, 1], [1, 1])
    tail_N = np.full(4, np.log(outside), np.float32)
    signals = {name: replace(signal, tail_logprobs_N=tail_N) for name, signal in view.signals.items()}
    config = objective(target={"kind": "divergence"}, extrapolate="by_distance")
    if refused:
        with pytest.raises(CacheError, match=r"teacher leaves 0\.200 .* outside its top-k, more than 0.01"):
            prepare_rollouts(config, [replace(view, signals=signals)])
    else:
        assert prepare_rollouts(config, [replace(view, signals=signals)]).keep_R.all()


def test_a_value_that_is_not_finite_is_named_with_signal_rollout_and_token():
    view = cache([0.0] * 3, [1] * 3, [1] * 3)
    broken = view.signals["teacher"].logprobs_N.copy()
    broken[3] = np.nan
    with pytest.raises(
        CacheError, match=r"signal teacher: 1 values .* first is nan at token 1 of rollout r1"
    ):
        prepare_rollouts(ObjectiveConfig(), [replace(view, signals=signals_of({"teacher": broken}))])


def test_missing_rewards_are_refused_where_they_are_read():
    view = cache([0.0] * 2, [float("nan")] * 2, [1, 1])
    prepare_rollouts(ObjectiveConfig(), [view])
    with pytest.raises(CacheError, match="all rewards are missing"):
        prepare_rollouts(objective(target="reward"), [view])


def test_groups_of_one_are_refused_where_rollouts_are_compared():
    view = cache([0.0] * 2, [1, 0], [1, 2])
    with pytest.raises(CacheError, match="each of the 2 prompts has a single rollout"):
        prepare_rollouts(objective(target="reward"), [view])


def test_a_few_groups_of_one_are_noted():
    found = prepare_rollouts(objective(target="reward"), [cache([0.0] * 3, [1, 0, 1], [1, 1, 2])])
    assert found.notes == ("1 of 2 prompts have a single rollout and nothing to compare",)
    assert found.columns["main/reward"][2] == 0


def test_weights_that_sum_to_zero_are_refused():
    view = cache([0.0] * 2, [1, 1], [1, 1])
    with pytest.raises(CacheError, match=r"term main: rollout weights sum to zero .*rows: incorrect"):
        prepare_rollouts(objective(target="mle", rows="incorrect"), [view])


def test_weights_that_are_not_a_number_are_refused():
    view = replace(cache([0.0] * 2, [1, 1], [1, 1]), logprobs_N=np.full(4, -1e38, np.float32))
    config = objective(target="mle", rollout_weights=[{"kind": "perplexity", "tau": 1e-300}])
    with np.errstate(all="ignore"), pytest.raises(CacheError, match="rollout weights sum to zero"):
        prepare_rollouts(config, [view])


def test_a_balance_without_one_outcome_is_refused():
    view = cache([0.0] * 2, [1, 1], [1, 1])
    with pytest.raises(CacheError, match="2 rollouts are correct and 0 are not"):
        prepare_rollouts(objective(target="mle", select=["balance_outcomes"]), [view])


def test_a_selection_that_keeps_nothing_is_refused():
    with pytest.raises(CacheError, match="selection pass_rate keeps none of the cache's 2 rollouts"):
        prepare_rollouts(objective(target="mle", select=["pass_rate"]), [cache([0.0] * 2, [1, 1], [1, 1])])


def test_an_empty_cache_is_refused():
    with pytest.raises(CacheError, match="no rollouts"):
        prepare_rollouts(ObjectiveConfig(), [])


def test_prompts_that_are_no_pairs_are_refused():
    view = cache([0.0] * 4, [1] * 4, [1, 1, 2, 2], origins=["teacher", "student", "student", "student"])
    with pytest.raises(CacheError, match="1 of 2 prompts are no pair"):
        prepare_rollouts(recipe("soda"), [replace(view, signals={"warmup": view.signals["teacher"]})])
