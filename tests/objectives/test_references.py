"""Every recipe against its own equation: value, gradient, and independence of how the batch is cut."""

from dataclasses import replace
from math import isfinite

import pytest
import torch
from objective_cases import METHODS, World, evaluate, make_world, recipe
from objective_references import REFERENCES

from lightopd.schemas.objectives.objective import ObjectiveConfig

RECIPES = sorted(path.stem for path in METHODS.glob("*.yaml"))
DRIFTS = (0.3, 1.0)


def configured(name: str) -> ObjectiveConfig:
    """The recipe as shipped; Prune-OPD's numbers fit long rollouts and are made small."""
    if name != "prune_opd":
        return recipe(name)
    return recipe(name, token_weights=[{"kind": "drift_fade", "top_k": 3, "drop": 0.2}])


def reference(name: str, world: World) -> tuple[float, torch.Tensor]:
    logits_NV = world.student_NV.clone().requires_grad_()
    value = REFERENCES[name].loss(world, logits_NV.log_softmax(-1))
    return value.item(), torch.autograd.grad(value, logits_NV)[0]


def test_every_recipe_has_a_reference():
    assert set(REFERENCES) == set(RECIPES)


@pytest.mark.parametrize("drift", DRIFTS)
@pytest.mark.parametrize("name", RECIPES)
def test_value_and_gradient_are_those_of_the_equation(name, drift):
    world = make_world(1, drift=drift)
    value, gradient_NV, _ = evaluate(configured(name), world)
    wanted, wanted_NV = reference(name, world)
    if not REFERENCES[name].is_surrogate:
        assert value == pytest.approx(wanted, abs=2e-6)
    assert wanted_NV.abs().max() > 1e-3
    torch.testing.assert_close(gradient_NV, wanted_NV, atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_neither_micro_batches_nor_the_order_of_the_cache_change_anything(name):
    world, config = make_world(3), configured(name)
    value, gradient_NV, metrics = evaluate(config, world, top_k=4)
    split = [[6, 7], [3, 2, 0, 1], [5, 4]]
    value_2, gradient_2_NV, metrics_2 = evaluate(
        config, world, top_k=4, splits=split, order=[3, 0, 7, 1, 6, 5, 2, 4]
    )
    assert value_2 == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(gradient_2_NV, gradient_NV, atol=1e-10, rtol=0)
    assert metrics_2 == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_outside_the_loss_mask_have_no_gradient(name):
    world = make_world(4)
    _, gradient_NV, _ = evaluate(configured(name), world, top_k=4)
    assert (gradient_NV[~world.loss_mask_N] == 0).all()


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_metric_is_the_step_loss(name):
    world = make_world(5)
    value, _, metrics = evaluate(configured(name), world, splits=[[0, 1], [2, 3, 4, 5], [6, 7]])
    assert metrics["loss"] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_rollout_without_a_trained_token_leaves_value_and_gradient_finite(name):
    world = make_world(4)
    masked = replace(world, loss_mask_N=world.loss_mask_N & (world.row_N != 3))
    value, gradient_NV, metrics = evaluate(configured(name), masked, top_k=4)
    assert isfinite(value)
    assert gradient_NV.isfinite().all()
    assert isfinite(metrics["loss"])


@pytest.mark.parametrize("reduce", ["sequence_mean", "sequence_sum", "token_mean"])
def test_a_step_that_shows_no_token_is_worth_nothing(reduce):
    world = make_world(4)
    plain = recipe("lightning_opd", reduce=reduce).model_dump(mode="json")
    first_turn_only = ObjectiveConfig.model_validate({**plain, "curriculum": {"kind": "turns"}})
    value, gradient_NV, _ = evaluate(first_turn_only, replace(world, turns_N=world.turns_N + 1))
    assert value == 0
    assert gradient_NV.abs().max() == 0
