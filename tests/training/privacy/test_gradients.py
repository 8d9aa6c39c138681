"""The private gradient against its equation, with every rollout's gradient known."""

import math

import pytest
import torch
from torch import nn

from lightopd.schemas.finetune import PrivacyConfig
from lightopd.training.privacy.gradients import PrivateGradients

LENGTHS = (0.5, 3.0, 8.0)
"""Of the gradients of three rollouts, before they are divided by the batch."""


def model(width=4):
    return nn.Linear(width, 3, bias=False, dtype=torch.float64)


def gradients(width=4):
    torch.manual_seed(0)
    raw = [torch.randn(3, width, dtype=torch.float64) for _ in LENGTHS]
    return [one / one.norm() * length for one, length in zip(raw, LENGTHS, strict=True)]


def summed(config, rollouts, batch=4, step=0, key=1):
    student = model()
    private = PrivateGradients(config, student, batch, key)
    for gradient in rollouts:
        student.weight.grad = gradient / batch  # as the loss of a rollout is divided by the batch
        private.add_rollout()
        assert student.weight.grad is None
    told = private.finish(step)
    return student.weight.grad, told["clipped_rollouts"]


@pytest.mark.parametrize("clip", [0.1, 1.0, 5.0, None])
def test_the_sum_is_that_of_gradients_cut_to_the_clip(clip):
    found, clipped = summed(PrivacyConfig(clip=clip, noise=0), gradients())
    limit = math.inf if clip is None else clip
    wanted = sum(one * min(1.0, limit / float(one.norm())) for one in gradients()) / 4
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    assert clipped == pytest.approx(sum(length > limit for length in LENGTHS) / 3)


@pytest.mark.parametrize("left_out", range(3))
def test_leaving_a_rollout_out_moves_the_sum_by_the_clip_at_most(left_out):
    config, all_of_them = PrivacyConfig(clip=1.0, noise=0), gradients()
    rest = [one for place, one in enumerate(all_of_them) if place != left_out]
    moved = summed(config, all_of_them)[0] - summed(config, rest)[0]
    assert 4 * float(moved.norm()) == pytest.approx(min(1.0, LENGTHS[left_out]), rel=1e-9)


def test_the_noise_has_the_deviation_that_the_bound_rests_on_and_reaches_weights_that_no_rollout_has():
    student = nn.Linear(300, 400)
    private = PrivateGradients(PrivacyConfig(clip=0.5, noise=2.0), student, 8, key=3)
    told = private.finish(0)
    wanted = 2.0 * 0.5 / 8
    assert float(student.weight.grad.std()) == pytest.approx(wanted, rel=0.01)  # four standard errors
    assert abs(float(student.weight.grad.mean())) < 4 * wanted / 120_000**0.5
    assert float(student.bias.grad.std()) == pytest.approx(wanted, rel=0.15)
    assert math.isnan(told["clipped_rollouts"])


def test_the_noise_is_put_on_once_and_is_another_at_each_step_and_under_each_key():
    config = PrivacyConfig(clip=1.0, noise=1.0)
    plain, _ = summed(PrivacyConfig(clip=1.0, noise=0), gradients())
    first, again = (summed(config, gradients())[0] for _ in range(2))
    assert torch.equal(first, again)
    noise = first - plain
    torch.testing.assert_close(noise, summed(config, [])[0], rtol=0, atol=1e-7)
    for other in (summed(config, [], step=1)[0], summed(config, [], key=2)[0]):
        assert (other - noise).abs().max() > 0.01


def test_without_noise_a_weight_that_no_rollout_reaches_has_no_gradient():
    student = model()
    private = PrivateGradients(PrivacyConfig(clip=1.0, noise=0), student, 4, key=1)
    private.finish(0)
    assert student.weight.grad is None
