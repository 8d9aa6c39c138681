"""Right rollouts preferred to wrong ones, without pairs."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import evaluate, make_world, recipe

from lightopd.errors import CacheError


def step(world):
    return evaluate(recipe("vpd_teacher"), world)


def test_where_the_student_is_still_its_prior_each_outcome_loses_log_two():
    world = make_world(2, drift=0.0)
    same = replace(world, student_NV=world.tables["rollout_student"].clone())
    value, gradient_NV, _ = step(same)
    assert value == pytest.approx(2 * math.log(2), abs=1e-6)
    assert gradient_NV.abs().max() > 1e-4  # and still prefers the right ones


def test_swapping_outcomes_and_the_sign_of_what_was_gained_changes_nothing():
    world = make_world(2)
    swapped = replace(
        world,
        rewards=tuple(1 - reward for reward in world.rewards),
        student_NV=world.tables["rollout_student"].clone(),
        tables={**world.tables, "rollout_student": world.student_NV.log_softmax(-1)},
    )
    assert step(swapped)[0] == pytest.approx(step(world)[0], abs=1e-6)


def test_the_likelihood_of_right_rollouts_is_pushed_up_and_that_of_wrong_ones_down():
    world = make_world(2)
    _, gradient_NV, _ = step(world)
    for row in range(world.size):
        sign = 1 if world.rewards[row] >= 0.5 else -1
        for n in world.tokens(row):
            if world.loss_mask_N[n]:
                assert sign * float(gradient_NV[n, world.ids_N[n]]) < 0


def test_each_outcome_counts_once_however_many_rollouts_it_has():
    world = make_world(2)
    _, gradient_NV, _ = step(world)
    right = torch.zeros_like(gradient_NV)
    for row in range(world.size):
        if world.rewards[row] >= 0.5:
            for n in world.tokens(row):
                right[n] = gradient_NV[n]
    assert 0 < float(right.abs().sum()) < float(gradient_NV.abs().sum())


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_cache_with_one_outcome_is_refused(reward):
    world = make_world(2)
    with pytest.raises(
        CacheError, match=r"prefers right rollouts to wrong ones: [08] are right and [08] are"
    ):
        step(replace(world, rewards=(reward,) * world.size))
