"""Every recipe's loss on a GPU is that on a CPU."""

import pytest
import torch
from objective_cases import METHODS, evaluate, make_world, recipe

RECIPES = sorted(path.stem for path in METHODS.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_value_and_gradient_do_not_depend_on_the_device(name, device):
    world = make_world(1)
    value, gradient_NV, metrics = evaluate(recipe(name), world, top_k=4)
    found, found_NV, found_metrics = evaluate(recipe(name), world, top_k=4, device=device)
    assert found == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(found_NV, gradient_NV, atol=1e-6, rtol=1e-5)
    assert found_metrics == pytest.approx(metrics, abs=1e-5, nan_ok=True)
