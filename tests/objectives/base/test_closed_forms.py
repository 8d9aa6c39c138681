"""Closed forms of divergences and of their slopes, against the plain terms and autograd in float64."""

# C = positions, T = tokens

import pytest
import torch
from torch import Tensor

from lightopd.objectives.base.closed_forms import closed_form
from lightopd.objectives.base.divergences import outcome_terms
from lightopd.objectives.base.part import Outcomes
from lightopd.schemas.objectives.targets import DivergenceTarget

CONFIGS = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    *({"divergence": "jsd", "parameter": beta} for beta in (None, 0.0, 0.1, 1.0)),
    *({"divergence": "skew_forward_kl", "parameter": share} for share in (None, 0.0, 0.6)),
    *({"divergence": "skew_reverse_kl", "parameter": share} for share in (None, 0.0, 0.6)),
    {"divergence": "tv"},
    *({"divergence": "alpha", "parameter": alpha} for alpha in (None, 0.9, -0.5, 1.5)),
    {"divergence": "reverse_kl", "element_clip": 0.01},
]


def sides(scale: float, closeness: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    teacher_CT = (scale * torch.randn(5, 31, generator=generator, dtype=torch.float64)).log_softmax(1)
    moved_CT = closeness * scale * torch.randn(5, 31, generator=generator, dtype=torch.float64)
    return teacher_CT, (teacher_CT + moved_CT).log_softmax(1)


def plain(config: DivergenceTarget, teacher_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
    leaf_CT = student_CT.detach().requires_grad_()
    terms_CT = outcome_terms(config, Outcomes(teacher_CT, leaf_CT, torch.ones(())))
    return terms_CT.detach(), torch.autograd.grad(terms_CT.sum(), leaf_CT)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("closeness", [1.0, 1e-3])
@pytest.mark.parametrize("keys", CONFIGS, ids=str)
def test_sums_and_slopes_are_those_of_the_plain_terms(keys, closeness, dtype):
    config = DivergenceTarget(kind="divergence", **keys)
    teacher_CT, logprobs_CT = sides(2.0, closeness)
    terms_CT, slope_CT = plain(config, teacher_CT, logprobs_CT)
    form, tolerance = closed_form(config), 2e-6 if dtype == torch.float32 else 1e-12
    if config.divergence == "alpha":
        tolerance = 1e-5  # the plain terms are a short series where the sides are close

    def arguments() -> tuple[Tensor, Tensor, Tensor]:
        own_CT = logprobs_CT.to(dtype)
        return teacher_CT.to(dtype, copy=True), own_CT.clone(), own_CT.exp()

    found = (*form.sums(*arguments()), form.slopes(*arguments()))
    for ours, theirs in zip(found, (terms_CT.sum(1), slope_CT.sum(1), slope_CT), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", CONFIGS, ids=str)
def test_probabilities_that_float32_loses_leave_everything_finite(keys):
    form = closed_form(DivergenceTarget(kind="divergence", **keys))
    teacher_CT = torch.tensor([[0.0, -150.0, -300.0, -110.0]])
    for one, other in ((teacher_CT, teacher_CT.flip(1)), (teacher_CT, teacher_CT)):
        if keys.get("parameter") in (-0.5, 1.5) and one is not other:
            continue  # the divergence itself is beyond float32
        for value in (
            *form.sums(one.clone(), other.clone(), other.exp()),
            form.slopes(one.clone(), other.clone(), other.exp()),
        ):
            assert value.isfinite().all()


@pytest.mark.parametrize("keys", CONFIGS[:-1], ids=str)
def test_equal_sides_have_no_slope(keys):
    form = closed_form(DivergenceTarget(kind="divergence", **keys))
    teacher_CT = sides(3.0)[0].float()
    slope_CT = form.slopes(teacher_CT.clone(), teacher_CT.clone(), teacher_CT.exp())
    assert float(slope_CT.abs().max()) < 1e-7
