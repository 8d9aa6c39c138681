"""A short run of every recipe, with the student's logits as the parameters."""

import pytest
import torch
from objective_cases import METHODS, evaluate, make_world, recipe

from lightopd.objectives.state import ObjectiveState

STEPS = 6
ADVANTAGES = {"log_ratio", "reward", "signal_ratio", "constant"}


@pytest.mark.parametrize("name", sorted(path.stem for path in METHODS.glob("*.yaml")))
def test_a_short_run_moves_the_objective_the_right_way(name):
    """A loss falls. The value of an advantage's surrogate says nothing; there the logits must have moved
    against the first gradient, that is, towards what the first step rewarded."""
    config, world, state = recipe(name), make_world(4), ObjectiveState(steps=100)
    logits_NV = world.student_NV.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits_NV], lr=0.05)
    values, gradients = [], []
    for _ in range(STEPS):
        value, gradient_NV, _ = evaluate(config, world, top_k=4, state=state, student_NV=logits_NV.detach())
        values.append(value)
        gradients.append(gradient_NV)
        logits_NV.grad = gradient_NV
        optimizer.step()
    moved_NV = logits_NV.detach() - world.student_NV
    assert (moved_NV * gradients[0]).sum() < 0
    if not ADVANTAGES & {term.target.kind for term in config.terms}:
        assert values[-1] < 0.99 * values[0]
