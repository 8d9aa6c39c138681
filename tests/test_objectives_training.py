"""A short run of every recipe: the student's logits are the parameters, and the objective moves the right way."""

import pytest
import torch
from objective_cases import METHODS, evaluate, make_world, recipe

from lightopd.objectives.state import ObjectiveState

STEPS = 25
RISING = "loss falls"
ADVANTAGES = {"log_ratio", "reward"}


@pytest.mark.parametrize("name", sorted(path.stem for path in METHODS.glob("*.yaml")))
def test_a_short_run_moves_the_objective_the_right_way(name):
    """A loss falls. An advantage's surrogate has no meaningful value, so there the sampled tokens' mean
    log-probability, weighed by what the first gradient said of them, must rise."""
    config, world = recipe(name), make_world(4)
    late = ObjectiveState(steps=100)
    logits_NV = world.student_NV.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits_NV], lr=0.02)
    first, first_NV, _ = evaluate(config, world, top_k=4, state=late)
    for _ in range(STEPS):
        _, gradient_NV, _ = evaluate(config, world, top_k=4, state=late, student_NV=logits_NV.detach())
        logits_NV.grad = gradient_NV
        optimizer.step()
    last, _, _ = evaluate(config, world, top_k=4, state=late, student_NV=logits_NV.detach())
    moved_NV = (logits_NV.detach() - world.student_NV) * first_NV
    assert moved_NV.sum() < 0
    if not ADVANTAGES & {term.target.kind for term in config.terms}:
        assert last < 0.99 * first


def test_reverse_kl_and_lightning_both_reach_a_teacher_that_the_student_can_be():
    world = make_world(4)
    for name, steps in (("f_reverse_kl", 400), ("f_forward_kl", 400)):
        logits_NV = world.student_NV.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits_NV], lr=0.05)
        for _ in range(steps):
            _, gradient_NV, _ = evaluate(recipe(name), world, student_NV=logits_NV.detach())
            logits_NV.grad = gradient_NV
            optimizer.step()
        value, _, _ = evaluate(recipe("f_reverse_kl"), world, student_NV=logits_NV.detach())
        assert value < 1e-3
