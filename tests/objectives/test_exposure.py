"""Which exposure teaches: the choice, what it learns from, and that it is all that changes."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from objective_cases import evaluate, make_world, objective, recipe
from pydantic import ValidationError

from lightopd.objectives.exposure import Exposure, is_choice_due, level_of, next_exposure, policy
from lightopd.objectives.requirements import needs
from lightopd.objectives.state import ObjectiveState, advance, exposure_metric, reads_held_out, restored
from lightopd.schemas.objectives.weights import TeacherExposure

FIVE = TeacherExposure()


def at(level: int, preferences=(0.0,) * 5, loss=1.0, rewards=()) -> Exposure:
    return Exposure(level, list(preferences), loss, list(rewards))


@pytest.mark.parametrize("level", range(5))
def test_a_term_is_taught_by_the_exposure_that_was_chosen_and_by_nothing_else(level):
    world = make_world(4)
    state = ObjectiveState(steps=7, exposure=at(level))
    alone = objective(
        signal=f"exposure_{level}",
        target={"kind": "divergence", "divergence": "forward_kl", "support": "tail"},
    )
    value, gradient_NV, _ = evaluate(recipe("atesd"), world, state=state)
    wanted, wanted_NV, _ = evaluate(alone, world)
    assert value == wanted
    assert (gradient_NV == wanted_NV).all()


def test_all_exposures_are_read_from_the_cache_with_their_supports():
    wanted = needs(recipe("atesd"))
    names = {f"exposure_{level}" for level in range(5)}
    assert set(wanted.signals) == set(wanted.topk) == set(wanted.supports) == names
    assert wanted.state


def test_a_choice_is_made_every_so_many_steps_and_only_then_needs_the_held_out_loss():
    config = recipe("atesd")
    due = [step for step in range(1, 21) if reads_held_out(config, ObjectiveState(steps=step - 1))]
    assert due == [5, 10, 15, 20]
    assert [step for step in range(1, 21) if is_choice_due(FIVE, step)] == due
    assert not reads_held_out(recipe("opsd"), ObjectiveState(steps=4))


def test_the_middle_exposure_teaches_before_the_first_choice_which_learns_nothing():
    first = next_exposure(FIVE, None, 5, 1.0)
    assert level_of(FIVE, None) == 2
    assert first.preferences == [0.0] * 5
    assert first.rewards == []
    assert first.loss == 1.0


def test_preferences_move_by_the_normalised_fall_of_the_loss_as_reinforce_says():
    before = at(3, (0.1, 0.0, -0.2, 0.3, 0.0), loss=1.0, rewards=(0.02, 0.04))
    after = next_exposure(FIVE, before, 20, 0.88)
    rewards = [0.02, 0.04, 0.12]
    advantage = (0.12 - np.mean(rewards)) / np.std(rewards)
    chance_L = policy(FIVE, np.array(before.preferences))
    wanted = np.array(before.preferences) + 0.5 * advantage * (np.eye(5)[3] - chance_L)
    assert after.rewards == pytest.approx(rewards)
    assert after.preferences == pytest.approx(wanted.tolist())
    assert after.preferences[3] > before.preferences[3]


def test_a_loss_that_rises_is_no_reward_and_not_a_penalty_of_its_size():
    low, high = (next_exposure(FIVE, at(1, rewards=(0.1,)), 10, loss) for loss in (1.1, 9.0))
    assert low == Exposure(low.level, low.preferences, 1.1, [0.1, 0.0])
    assert high.preferences == low.preferences
    assert low.preferences[1] < 0


def test_the_policy_is_a_distribution_and_no_exposure_is_given_up():
    chance_L = policy(FIVE, np.array([50.0, 0.0, 0.0, 0.0, -50.0]))
    assert chance_L.sum() == pytest.approx(1)
    assert chance_L.min() >= 0.1 / 5


def test_draws_follow_the_policy_and_the_seed():
    known = at(0, (2.0, 0.0, 0.0, 0.0, 0.0), rewards=(0.1,), loss=0.9)
    drawn = [next_exposure(FIVE, known, 5 * n, 0.8) for n in range(4000)]
    shares_L = np.bincount([one.level for one in drawn], minlength=5) / 4000
    # Rewards (.1, .1) have no spread, so that the policy is that of the preferences before.
    np.testing.assert_allclose(shares_L, policy(FIVE, np.array(known.preferences)), atol=0.03)
    other = TeacherExposure(seed=1)
    assert [next_exposure(other, known, 5 * n, 0.8).level for n in range(50)] != [
        one.level for one in drawn[:50]
    ]


def test_an_exposure_under_which_the_loss_falls_is_chosen_most_in_the_end():
    exposure, loss = next_exposure(FIVE, None, 5, 100.0), 100.0
    counts_L = np.zeros(5)
    for window in range(2, 400):
        loss -= 0.1 if exposure.level == 3 else 0.05
        exposure = next_exposure(FIVE, exposure, 5 * window, loss)
        counts_L[exposure.level] += window > 200
    assert counts_L.argmax() == 3
    assert counts_L[3] > 0.5 * counts_L.sum()


def test_the_state_survives_a_checkpoint_and_older_checkpoints_have_none():
    config = recipe("atesd")
    state = advance(config, ObjectiveState(steps=4), {"loss": 1.0, "held_out": 0.5})
    assert state.exposure is not None
    assert restored(json.loads(json.dumps(asdict(state)))) == state
    assert restored({"steps": 3, "rung": 0, "rung_since": 0, "averages": {}}) == ObjectiveState(steps=3)
    assert exposure_metric(config, state) == {"exposure": state.exposure.level}
    assert exposure_metric(recipe("opsd"), state) == {}


@pytest.mark.parametrize(
    "keys",
    [
        {"signal": "teacher"},
        {"signal": "exposure_0", "router": {"signals": {"math": "teacher"}}},
        {"signal": "exposure_0", "extrapolate": {"kind": "constant"}},
    ],
)
def test_an_exposure_without_a_term_that_it_can_teach_is_refused(keys):
    with pytest.raises(ValidationError, match="exposure needs a term whose signal is one of exposure_0"):
        objective(exposure={}, **keys)
