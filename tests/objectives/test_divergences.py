"""Divergences on a support: exact tails, never negative, at rest where teacher and student agree."""

import pytest
import torch
from objective_cases import tail_of
from objective_references import DIVERGENCES, jsd, kl
from torch import Tensor

from lightopd.objectives.base.batch import SignalBatch, StudentTokens
from lightopd.objectives.base.divergences import token_divergence
from lightopd.objectives.base.part import Outcomes
from lightopd.objectives.loss import compute_loss
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.objectives.targets import DivergenceTarget

KINDS = {
    "forward_kl": ("forward_kl", None),
    "reverse_kl": ("reverse_kl", None),
    "jsd": ("jsd", 0.5),
    "skew_kl": ("skew_forward_kl", 0.1),
    "skew_reverse_kl": ("skew_reverse_kl", 0.1),
    "tv": ("tv", None),
    "alpha": ("alpha", 0.5),
}


def target(kind: str, parameter: float | None = None, **keys: object) -> DivergenceTarget:
    return DivergenceTarget.model_validate(
        {"kind": "divergence", "divergence": kind, "parameter": parameter, **keys}
    )


def logits(seed: int, tokens: int = 5, vocabulary: int = 11, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    teacher, student = (
        spread * torch.randn(tokens, vocabulary, generator=random, dtype=torch.float64) for _ in range(2)
    )
    return teacher, student


def on_support(teacher_NV: Tensor, student_NV: Tensor, k: int) -> Outcomes:
    """Outcomes on the teacher's k most likely tokens, from logits."""
    teacher_NV, student_NV = teacher_NV.log_softmax(-1), student_NV.log_softmax(-1)
    ids_NK = teacher_NV.topk(k, dim=1).indices
    sides = [
        torch.cat([table.gather(1, ids_NK), tail_of(table, ids_NK)[:, None]], 1)
        for table in (teacher_NV, student_NV)
    ]
    is_real_NM = torch.isfinite(sides[1])
    return Outcomes(*(side.masked_fill(~is_real_NM, 0.0) for side in sides), is_real_NM)


@pytest.mark.parametrize("k", [0, 1, 4, 10, 11])
@pytest.mark.parametrize("name", KINDS)
def test_a_support_with_tail_is_the_divergence_of_the_merged_outcomes(name, k):
    outcomes = on_support(*logits(0), k)
    found_N = token_divergence(target(*KINDS[name]), outcomes)
    for row in range(5):
        real_M = outcomes.is_real_NM[row]
        wanted = DIVERGENCES[name](outcomes.teacher_NM[row][real_M], outcomes.student_NM[row][real_M])
        assert found_N[row].item() == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("name", KINDS)
def test_merging_tokens_into_the_tail_never_raises_a_divergence(name, k):
    teacher_NV, student_NV = logits(1, tokens=40)
    config = target(*KINDS[name])
    part_N = token_divergence(config, on_support(teacher_NV, student_NV, k))
    full_N = token_divergence(config, on_support(teacher_NV, student_NV, 11))
    assert (part_N >= 0).all()
    assert (part_N <= full_N + 1e-12).all()


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("name", KINDS)
def test_never_negative_in_float32_however_close_the_two_are(name, gap):
    teacher_NV, noise_NV = logits(2, tokens=500, vocabulary=30)
    outcomes = on_support(teacher_NV.float(), (teacher_NV + gap * noise_NV).float(), 6)
    assert (token_divergence(target(*KINDS[name]), outcomes) >= 0).all()


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("reverse_kl", "stop_gradient"),
        *((name, rule) for name in KINDS if name != "tv" for rule in ("tail", "renormalised")),
    ],
)
def test_value_and_gradient_vanish_where_the_two_agree(name, k, rule):
    teacher_NV = logits(3)[0]
    student_NV = teacher_NV.clone().requires_grad_()
    value_N = token_divergence(target(*KINDS[name], support=rule), on_support(teacher_NV, student_NV, k))
    (gradient_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
    assert value_N.abs().max() < 1e-12
    assert gradient_NV.abs().max() < 1e-12


def test_a_plain_truncated_divergence_would_not_rest_where_the_two_agree():
    teacher_NV = logits(3)[0]
    student_NV = teacher_NV.clone().requires_grad_()
    outcomes = on_support(teacher_NV, student_NV, 4)
    student_NK, teacher_NK = outcomes.student_NM[:, :-1], outcomes.teacher_NM[:, :-1]
    plain = (student_NK.exp() * (student_NK - teacher_NK)).sum()
    assert torch.autograd.grad(plain, student_NV)[0].abs().max() > 0.01


def test_jsd_becomes_forward_and_reverse_kl_at_its_ends():
    outcomes = on_support(*logits(4), 11)
    forward_N, reverse_N = (token_divergence(target(kind), outcomes) for kind in ("forward_kl", "reverse_kl"))
    for beta, wanted_N in ((0.0, forward_N), (1.0, reverse_N)):
        torch.testing.assert_close(token_divergence(target("jsd", beta), outcomes), wanted_N)
    near = 1e-6
    torch.testing.assert_close(
        token_divergence(target("jsd", near), outcomes) / near, forward_N, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        token_divergence(target("jsd", 1 - near), outcomes) / near, reverse_N, rtol=1e-3, atol=1e-4
    )


def test_alpha_becomes_forward_and_reverse_kl_at_its_ends():
    outcomes = on_support(*logits(5, spread=1.0), 11)
    for alpha, kind in ((1 - 1e-6, "forward_kl"), (1e-6, "reverse_kl")):
        near_N = token_divergence(target("alpha", alpha), outcomes)
        torch.testing.assert_close(near_N, token_divergence(target(kind), outcomes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [-1.0, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("gap", [-0.009, -0.004, 0.004, 0.009])
def test_the_series_of_alpha_is_its_definition_to_the_last_term(alpha, gap):
    """Below a gap of 0.01 the series is summed; without its last term it would be off by 1e-6 and more."""
    teacher_NM = torch.tensor([[0.3, 0.7]], dtype=torch.float64).log()
    student_NM = teacher_NM + gap
    ones = torch.ones(1, 2, dtype=torch.bool)
    found = token_divergence(target("alpha", alpha), Outcomes(teacher_NM, student_NM, ones)).item()
    t, s = teacher_NM.exp(), student_NM.exp()
    terms = (t**alpha * s ** (1 - alpha) - alpha * t - (1 - alpha) * s) / (alpha * (alpha - 1))
    assert found == pytest.approx(terms.sum().item(), rel=3e-7)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_with_any_share_is_that_of_its_definition_and_bounded_by_the_shares_entropy(beta):
    teacher_NV, student_NV = (table.log_softmax(-1) for table in logits(6, tokens=30))
    found_N = token_divergence(target("jsd", beta), on_support(teacher_NV, student_NV, 11))
    wanted_N = torch.stack([jsd(t, s, beta) for t, s in zip(teacher_NV, student_NV, strict=True)])
    torch.testing.assert_close(found_N, wanted_N)
    shares = torch.tensor([beta, 1 - beta], dtype=torch.float64)
    assert (found_N <= -(shares * shares.log()).sum()).all()


def test_skew_zero_is_plain_kl():
    outcomes = on_support(*logits(7), 5)
    for kind in ("forward_kl", "reverse_kl"):
        found_N = token_divergence(target(f"skew_{kind}", 0.0), outcomes)
        torch.testing.assert_close(found_N, token_divergence(target(kind), outcomes))


def test_the_renormalised_rule_does_not_see_tokens_outside_the_support():
    teacher_NV, student_NV = logits(8)
    before_N = token_divergence(
        target("forward_kl", support="renormalised"), on_support(teacher_NV, student_NV, 4)
    )
    outside = teacher_NV < teacher_NV.topk(4, dim=1).values[:, -1:]
    moved_NV = torch.where(outside, student_NV + 3, student_NV)
    after_N = token_divergence(
        target("forward_kl", support="renormalised"), on_support(teacher_NV, moved_NV, 4)
    )
    torch.testing.assert_close(before_N, after_N)


def test_renormalised_kl_can_exceed_the_full_kl_and_the_tail_rule_cannot():
    teacher_NV, student_NV = logits(9, tokens=300)
    full_N = token_divergence(target("forward_kl"), on_support(teacher_NV, student_NV, 11))
    cut = on_support(teacher_NV, student_NV, 4)
    assert (token_divergence(target("forward_kl", support="renormalised"), cut) > full_N + 1e-6).any()
    assert (token_divergence(target("forward_kl"), cut) <= full_N + 1e-12).all()


def test_tempering_cached_log_probabilities_is_tempering_logits():
    teacher_NV, student_NV = logits(10)
    found_N = token_divergence(
        target("forward_kl", support="renormalised", temperature=1.5), on_support(teacher_NV, student_NV, 11)
    )
    tempered = zip((teacher_NV / 1.5).log_softmax(-1), (student_NV / 1.5).log_softmax(-1), strict=True)
    torch.testing.assert_close(found_N, 1.5**2 * torch.stack([kl(t, s) for t, s in tempered]))


def test_an_element_clip_bounds_each_outcome_and_stops_its_gradient():
    teacher_NV, student_NV = logits(11, tokens=1)
    student_NV.requires_grad_()
    outcomes = on_support(teacher_NV, student_NV, 11)
    terms_V = outcomes.teacher_NM.exp() * (outcomes.teacher_NM - outcomes.student_NM)
    found = token_divergence(target("forward_kl", element_clip=0.05), outcomes)
    assert found.item() == pytest.approx(terms_V.clamp(0, 0.05).sum().item(), abs=1e-12)
    assert (terms_V > 0.05).any()


def test_an_element_clip_is_least_at_the_teacher():
    teacher_NV = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    config = target("forward_kl", element_clip=0.05)
    students = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.99, 0.01], [0.5, 0.5]], dtype=torch.float64).log()
    found = [token_divergence(config, on_support(teacher_NV, one[None], 2)).item() for one in students]
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert min(found[1:]) > 0.01


def test_a_teacher_tail_lost_to_rounding_leaves_value_and_gradient_finite():
    outcomes = on_support(*logits(12, tokens=1), 4)
    lost_NM = outcomes.teacher_NM.clone()
    lost_NM[:, -1] = -87.0
    student_NM = outcomes.student_NM.clone().requires_grad_()
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        value = token_divergence(target(kind), Outcomes(lost_NM, student_NM, outcomes.is_real_NM)).sum()
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, student_NM)[0]).all()


@pytest.mark.parametrize("name", KINDS)
def test_extreme_log_probabilities_leave_value_and_gradient_finite_in_float32(name):
    teacher_NM = torch.tensor([[-1e-7, -90.0, -300.0], [-300.0, -1e-7, -17.0]])
    student_NM = torch.tensor([[-200.0, -1e-7, -60.0], [-1e-7, -200.0, -400.0]], requires_grad=True)
    value = token_divergence(target(*KINDS[name]), Outcomes(teacher_NM, student_NM, teacher_NM < 0)).sum()
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, student_NM)[0]).all()


def test_padding_of_a_shorter_support_changes_nothing():
    """The second token has two entries, padded to four."""
    teacher_NV, student_NV = (table.log_softmax(-1) for table in logits(13, tokens=2))
    narrow, wide = (loss_on_widths(teacher_NV, student_NV, width) for width in (2, 4))
    assert narrow == pytest.approx(wide, abs=1e-12)


def loss_on_widths(teacher_NV: Tensor, student_NV: Tensor, width: int) -> float:
    """Mean loss of two tokens on supports of two entries each, padded to `width`."""
    from objective_cases import make_batch, make_world

    batch, _ = make_batch(make_world(), [3], [3], 2)
    ids_NK = teacher_NV.topk(2, dim=1).indices
    padded_ids_NK = torch.nn.functional.pad(ids_NK, (0, width - 2), value=-1)
    topk_NK = torch.nn.functional.pad(teacher_NV.gather(1, ids_NK), (0, width - 2), value=float("-inf"))
    student_NK = torch.nn.functional.pad(student_NV.gather(1, ids_NK), (0, width - 2))
    sampled_N = batch.ids_N[:, None]
    batch.signals["teacher"] = SignalBatch(
        teacher_NV.gather(1, sampled_N)[:, 0], padded_ids_NK, topk_NK, tail_of(teacher_NV, ids_NK)
    )
    student = StudentTokens(
        student_NV.gather(1, sampled_N)[:, 0],
        torch.zeros(2, dtype=torch.float64),
        {"teacher": student_NK},
        {"teacher": tail_of(student_NV, ids_NK)},
    )
    config = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}})
    return compute_loss(config, batch, student).value.item()
