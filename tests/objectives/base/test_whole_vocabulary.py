"""Divergences with a spread tail, against float64 sums over the whole vocabulary."""

# N = tokens, D = hidden size, V = vocabulary, K = support

from dataclasses import replace

import pytest
import torch
from one_rollout import one_rollout
from torch import Tensor

from lightopd.errors import ConfigError
from lightopd.models.head import Head
from lightopd.objectives.base.batch import RolloutBatch, SignalBatch
from lightopd.objectives.base.whole_vocabulary import spread_tails
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.plain_tensors import loss_from_logits
from lightopd.objectives.requirements import needs
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.student.forward import evaluate_tokens

N, D, V, K = 9, 6, 41, 5
KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tv", "alpha"]
HEADS = {
    "plain": {},
    "bias and temperature": {"with_bias": True, "temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"with_bias": True, "softcap": 2.5, "temperature": 1.4},
}


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(with_bias=False, softcap=None, temperature=1.0, dtype=torch.float32) -> Head:
    bias_V = normal(2, V).to(dtype) if with_bias else None
    return Head(normal(1, V, D).to(dtype).requires_grad_(), bias_V, softcap, temperature)


def student_logprobs(hidden_ND: Tensor, head: Head) -> Tensor:
    logits_NV = hidden_ND.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    if head.softcap is not None:
        logits_NV = head.softcap * (logits_NV / head.softcap).tanh()
    return (logits_NV / head.temperature).log_softmax(-1)


def make_signal(teacher_NV: Tensor, counts=(K, K - 2)) -> SignalBatch:
    """Top-k with supports of two widths in turn."""
    topk_NK, ids_NK = teacher_NV.topk(max(counts))
    width_N1 = torch.tensor(counts).repeat(N)[:N, None]
    is_kept_NK = torch.arange(max(counts)) < width_N1
    kept_NV = torch.zeros(N, V, dtype=torch.bool).scatter(1, ids_NK, is_kept_NK)
    tail_N = teacher_NV.masked_fill(kept_NV, -torch.inf).logsumexp(1)
    return SignalBatch(
        teacher_NV[:, 0].float(),
        ids_NK.masked_fill(~is_kept_NK, -1),
        topk_NK.float().masked_fill(~is_kept_NK, -torch.inf),
        tail_N.float(),
    )


def rebuilt(signal: SignalBatch, shape_V: Tensor) -> Tensor:
    """The teacher over the whole vocabulary, float64, row by row."""
    teacher_NV = torch.zeros(N, V, dtype=torch.float64)
    for n in range(N):
        ids_K = signal.topk_ids_NK[n][signal.topk_ids_NK[n] >= 0]
        kept_K = signal.topk_logprobs_NK[n, : len(ids_K)].double().exp()
        tail = signal.tail_logprobs_N[n].double().exp()
        rest_V = shape_V.double().clone()
        rest_V[ids_K] = 0
        teacher_NV[n] = rest_V / rest_V.sum() * tail if rest_V.sum() > 0 else 0
        teacher_NV[n, ids_K] = kept_K
    return teacher_NV / teacher_NV.sum(1, keepdim=True)


def make_batch(signal: SignalBatch) -> RolloutBatch:
    return one_rollout(torch.arange(N) * 3 % V, {"teacher": signal})


def objective_of(kind: str, tail: str = "shaped", **keys) -> ObjectiveConfig:
    target = {"kind": "divergence", "divergence": kind, "tail": tail, **keys}
    return ObjectiveConfig.model_validate({"target": target})


def loss_and_gradients(objective, batch, hidden_ND, head, shapes) -> list[Tensor]:
    wanted = needs(objective)
    tails = spread_tails(wanted.tails, shapes, V)
    hidden_ND = hidden_ND.detach().requires_grad_()
    student = evaluate_tokens(hidden_ND, head, batch, wanted.supports, tails)
    value = compute_loss(objective, batch, student).value
    return [value.detach(), *torch.autograd.grad(value, [hidden_ND, head.weight_VD])]


def reference(kind, teacher_NV, hidden_ND, head) -> list[Tensor]:
    weight_VD = head.weight_VD.detach().double().requires_grad_()
    hidden_ND = hidden_ND.detach().double().requires_grad_()
    student_NV = student_logprobs(hidden_ND, replace(head, weight_VD=weight_VD))
    value = dense_divergence(kind, teacher_NV, student_NV.exp()).mean()
    return [value.detach(), *torch.autograd.grad(value, [hidden_ND, weight_VD])]


def dense_divergence(kind: str, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p.log() - q.log())).sum(1)

    mixed_NV = (teacher_NV + student_NV) / 2
    return {
        "forward_kl": lambda: kl(teacher_NV, student_NV),
        "reverse_kl": lambda: kl(student_NV, teacher_NV),
        "jsd": lambda: (kl(teacher_NV, mixed_NV) + kl(student_NV, mixed_NV)) / 2,
        "skew_forward_kl": lambda: kl(teacher_NV, 0.1 * teacher_NV + 0.9 * student_NV),
        "skew_reverse_kl": lambda: kl(student_NV, 0.1 * student_NV + 0.9 * teacher_NV),
        "tv": lambda: (teacher_NV - student_NV).abs().sum(1) / 2,
        "alpha": lambda: 4 * (1 - (teacher_NV * student_NV).sqrt().sum(1)),
    }[kind]()


TEACHER_NV = (2 * normal(5, N, V)).log_softmax(-1)
SHAPE_V = (1.5 * normal(6, V)).softmax(0).float()
HIDDEN_ND = normal(3, N, D).float()


@pytest.mark.parametrize("tail", ["shaped", "uniform"])
@pytest.mark.parametrize("form", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_whole_vocabulary(kind, form, tail):
    head, signal = make_head(**form), make_signal(TEACHER_NV)
    shape_V = SHAPE_V if tail == "shaped" else torch.full((V,), 1 / V)
    shapes = {"teacher": SHAPE_V.numpy()}
    found = loss_and_gradients(objective_of(kind, tail), make_batch(signal), HIDDEN_ND, head, shapes)
    wanted = reference(kind, rebuilt(signal, shape_V), HIDDEN_ND, head)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_logits_give_the_loss_that_the_trainer_computes(kind):
    head, batch, objective = make_head(), make_batch(make_signal(TEACHER_NV)), objective_of(kind)
    shapes = {"teacher": SHAPE_V.numpy()}
    walked = loss_and_gradients(objective, batch, HIDDEN_ND, head, shapes)[0]
    plain = loss_from_logits(objective, batch, HIDDEN_ND @ head.weight_VD.T, shapes).value
    torch.testing.assert_close(plain.detach(), walked, rtol=1e-5, atol=1e-6)


def test_a_signal_that_keeps_the_whole_vocabulary_has_nothing_outside():
    head, signal = make_head(), make_signal(TEACHER_NV, counts=(V,))
    for kind in KINDS:
        objective = objective_of(kind)
        found = loss_and_gradients(
            objective, make_batch(signal), HIDDEN_ND, head, {"teacher": SHAPE_V.numpy()}
        )
        wanted = reference(kind, TEACHER_NV.exp(), HIDDEN_ND, head)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


def test_the_bucket_is_a_lower_bound_of_the_spread_tail():
    head, batch = make_head(), make_batch(make_signal(TEACHER_NV))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        values = [
            loss_and_gradients(
                objective_of(kind, tail), batch, HIDDEN_ND, head, {"teacher": SHAPE_V.numpy()}
            )[0]
            for tail in ("bucket", "shaped", "uniform")
        ]
        assert values[0] < values[1]
        assert values[0] < values[2]


def test_a_student_that_is_the_rebuilt_teacher_has_no_loss_and_no_gradient():
    signal = make_signal(TEACHER_NV)
    teacher_NV = rebuilt(signal, SHAPE_V).log().float()
    head = Head(torch.eye(V, requires_grad=True), None, None, 1.0)
    for kind in KINDS:
        value, grad_NV, _ = loss_and_gradients(
            objective_of(kind), make_batch(signal), teacher_NV, head, {"teacher": SHAPE_V.numpy()}
        )
        assert abs(float(value)) < 2e-6
        if kind != "tv":  # its gradient is a sign
            assert float(grad_NV.abs().max()) < 1e-6


def test_clipped_elements_are_clipped_in_the_tail_too():
    head, signal = make_head(), make_signal(TEACHER_NV)
    objective = objective_of("reverse_kl", element_clip=0.01)
    found = loss_and_gradients(objective, make_batch(signal), HIDDEN_ND, head, {"teacher": SHAPE_V.numpy()})[
        0
    ]
    teacher_NV, student_NV = rebuilt(signal, SHAPE_V), student_logprobs(HIDDEN_ND, head).exp()
    wanted = (student_NV * (student_NV.log() - teacher_NV.log())).clamp(0, 0.01).sum(1).mean()
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-7)


def test_a_signal_without_a_shape_and_a_shape_of_another_vocabulary_are_refused():
    tails = needs(objective_of("forward_kl")).tails
    with pytest.raises(ConfigError, match="term main needs the shape of signal teacher's tail"):
        spread_tails(tails, {}, V)
    with pytest.raises(ConfigError, match=r"has 41 entries, the student's head has 40; score the signal"):
        spread_tails(tails, {"teacher": SHAPE_V.numpy()}, 40)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target": {"support": "renormalised"}}, "it needs support: tail, no residual"),
        ({"target": {"divergence": "forward_kl", "residual": {}}}, "it needs support: tail, no residual"),
        ({"extrapolate": {"factor": 1.2}}, "leave extrapolate and router out"),
        ({"router": {"kind": "by_domain", "signals": {"code": "coder"}}}, "leave extrapolate and router out"),
    ],
)
def test_what_a_spread_tail_cannot_go_with_is_refused_at_load(keys, message):
    target = {"kind": "divergence", "tail": "shaped", **keys.get("target", {})}
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig.model_validate({**keys, "target": target})


def test_a_recipe_without_a_tail_is_written_as_it_was():
    """A checkpoint from before the setting holds none, and resumes."""
    plain = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}})
    assert "tail" not in plain.model_dump(mode="json")["terms"][0]["target"]
