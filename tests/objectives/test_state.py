"""What surrounds the loss: curricula, balance of terms, pairs of rollouts."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from objective_cases import evaluate, make_world, objective, recipe

from lightopd.objectives.requirements import needs
from lightopd.objectives.state import ObjectiveState, advance, reads_entropy, term_factor, visible_tokens

INDEX_N = np.arange(12)
TURNS_N = INDEX_N // 3


def shown(config, **state: int) -> int:
    """Visible tokens of a response of twelve tokens in four turns."""
    is_shown_N = visible_tokens(config, ObjectiveState(**state), INDEX_N, TURNS_N)
    number = int(is_shown_N.sum())
    assert is_shown_N[:number].all()
    return number


def test_front_to_back_adds_a_turn_every_few_steps_and_never_takes_one_back():
    config = objective(curriculum={"kind": "turns", "start": 1, "every": 2, "limit": 3})
    assert [shown(config, steps=steps) for steps in range(8)] == [3, 3, 6, 6, 9, 9, 9, 9]
    assert shown(objective(curriculum={"kind": "turns"}), steps=100) == 12
    assert shown(objective()) == 12


def test_the_ladder_rises_only_when_its_rung_is_held_and_the_student_uncertain():
    ladder = {"kind": "lengths", "lengths": [2, 4, 8], "every": 3, "min_entropy": 0.5}
    config, state, seen = objective(curriculum=ladder), ObjectiveState(), []
    for entropy in (0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6):
        state = advance(config, state, {"entropy": entropy})
        seen.append(shown(config, **{**asdict(state), "averages": {}}))
    assert seen == [2, 2, 4, 4, 4, 4, 4, 8, 8, 8, 8]


def test_the_ladder_asks_for_the_entropy_of_held_out_rollouts_only_when_a_rung_is_due():
    config = objective(curriculum={"kind": "lengths", "lengths": [2, 4, 8], "every": 3})
    at = {
        steps: reads_entropy(config, ObjectiveState(steps=steps, rung=1, rung_since=2))
        for steps in range(2, 9)
    }
    assert [steps for steps, reads in at.items() if reads] == [4, 7]
    assert not reads_entropy(config, ObjectiveState(steps=4, rung=2, rung_since=2))  # the last rung
    assert not reads_entropy(objective(), ObjectiveState(steps=2))


def test_an_entropy_that_was_not_measured_moves_no_rung():
    config = objective(curriculum={"kind": "lengths", "lengths": [2, 4], "every": 1})
    assert advance(config, ObjectiveState(), {"entropy": float("nan")}).rung == 0


def test_a_curriculum_trains_the_same_loss_on_the_tokens_it_shows():
    world = make_world(1)
    config = recipe("decoupling_lengths").model_dump(mode="json")
    config["curriculum"].update(lengths=[2, 4])
    short = replace(world, loss_mask_N=world.loss_mask_N & (world.index_N < 2))
    ladder, plain = objective(**config), recipe("decoupling_mix")
    torch.testing.assert_close(evaluate(ladder, world)[1], evaluate(plain, short)[1])


def test_a_state_survives_json():
    state = ObjectiveState(3, 1, 2, {"sft": 0.5, "kl": 0.25})
    assert ObjectiveState(**json.loads(json.dumps(asdict(state)))) == state


def test_balance_makes_the_follower_weigh_as_much_as_the_anchor():
    """Where the means began cancels: after any number of equal steps the factor is the losses' ratio."""
    config, state = recipe("raft"), ObjectiveState()
    assert term_factor(config, state, "kl") == 1
    for _ in range(4):
        state = advance(config, state, {"sft/loss": 3.0, "kl/loss": 0.5})
        assert term_factor(config, state, "kl") == pytest.approx(6, rel=1e-6)
        assert term_factor(config, state, "sft") == 1


def test_balance_follows_the_mean_of_recent_losses():
    config, state = recipe("raft"), ObjectiveState()
    for kl in (1.0, 0.5):
        state = advance(config, state, {"sft/loss": 1.0, "kl/loss": kl})
    mean = (0.9 * 0.1 * 1.0 + 0.1 * 0.5) / (1 - 0.9**2)
    assert term_factor(config, state, "kl") == pytest.approx(1 / mean, rel=1e-6)


def test_the_balanced_loss_is_the_sum_with_that_factor():
    config, world = recipe("raft"), make_world(1)
    state = advance(config, ObjectiveState(), {"sft/loss": 2.0, "kl/loss": 0.5})
    value, _, metrics = evaluate(config, world, state=state)
    assert value == pytest.approx(metrics["sft/loss"] + 4 * metrics["kl/loss"], rel=1e-5)


def test_only_curricula_and_balances_have_a_state():
    assert [
        name for name in ("tcod", "raft", "decoupling_lengths", "exopd") if needs(recipe(name)).state
    ] == [
        "tcod",
        "raft",
        "decoupling_lengths",
    ]
