"""The benchmark of the doubly robust residual says what the estimator promises."""

import pytest
import torch
from scripts import script

from lightopd.schemas.objectives.objective import ObjectiveConfig


@pytest.fixture(scope="module")
def bench():
    return script("benchmarks/residual.py")


def test_the_residual_has_no_bias_and_the_least_error_of_256_draws_but_for_its_capped_form(bench):
    found = bench.rows(4, 256, 8, size=200, drift=0.5, gap=0.5)
    rmse = {row["estimator"]: row["rmse"] for row in found}
    bias = {row["estimator"]: row["bias"] for row in found}
    assert sorted(rmse, key=rmse.get)[:2] == ["residual, capped at 2", "residual"]
    assert rmse["residual"] < 0.9 * min(rmse["top-k + tail"], rmse["ratio"], rmse["plain"])
    assert bias["ratio"] == bias["residual"] == bias["baseline and ratio"] == 0.0
    assert min(bias["plain"], bias["top-k + tail"]) > 0.03


def test_at_another_temperature_it_has_no_bias_either(bench):
    world = bench.make_world(0, 50, drift=0.5, gap=0.5, temperature=0.8)
    config = ObjectiveConfig.model_validate(bench.ESTIMATORS["residual"])
    assert bench.error(config, world, top_k=4, draws=256)[1] < 1e-9


def test_the_gradients_are_those_of_the_losses_formula(bench):
    world = bench.make_world(1, 20, drift=0.5, gap=0.5)
    rows_VV = bench.gradients(ObjectiveConfig.model_validate(bench.ESTIMATORS["ratio"]), world, 4)
    torch.testing.assert_close(world.behavior_V.exp() @ rows_VV, bench.exact(world))
