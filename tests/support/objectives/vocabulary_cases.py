"""Cases of a spread tail: heads, a signal, and the float64 divergence over the whole vocabulary."""

# N = tokens, D = hidden size, V = vocabulary, K = support

from dataclasses import replace

import torch
from one_rollout import one_rollout
from torch import Tensor

from lightopd.models.head import Head
from lightopd.objectives.base.batch import RolloutBatch, SignalBatch
from lightopd.objectives.base.whole_vocabulary import spread_tails
from lightopd.objectives.loss import compute_loss
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
