"""The benchmark of signals measures what it says."""

import math

import pytest
import torch
from scripts import script


@pytest.fixture(scope="module")
def bench():
    return script("benchmarks/signals.py")


def test_the_loss_is_that_of_the_rebuilt_distribution(bench):
    # Kept: 0.5. Outside: 0.3 and 0.2, rebuilt as 0.25 each, or as 0.3 and 0.2 by their own shape.
    teacher_NV = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    even = 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.25)
    ones_V = torch.ones(3, dtype=torch.float64)
    assert bench.kl_lost(teacher_NV, ones_V, 1) == pytest.approx(even)
    own_V = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64)
    assert bench.kl_lost(teacher_NV, own_V, 1) == pytest.approx(0, abs=1e-12)


def test_a_small_model_is_measured_from_samples_to_figures(bench, world):
    found = bench.measure_kl(world.teacher, [4], 64, 64, 0)
    assert found["measured_tokens"] >= 64
    assert 0 < found["kl"]["4"]["shaped"] < found["kl"]["4"]["uniform"]
