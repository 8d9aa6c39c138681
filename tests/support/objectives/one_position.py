"""One position with a vocabulary of V tokens, and the gradient of a loss there in expectation, exactly.

An expectation over a ~ s0 is a batch with one rollout of one token for each token of the vocabulary, weighed
by s0.
"""

from dataclasses import dataclass, replace

import torch
from objective_cases import objective, tail_of
from torch import Tensor

from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch, StudentTokens
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs
from lightopd.schemas.objectives.objective import ObjectiveConfig

V = 12


@dataclass(frozen=True)
class Context:
    """Log-probabilities [V] of everyone at one position."""

    student_V: Tensor
    rollout_V: Tensor
    tables: dict[str, Tensor]


def context(seed: int, drift: float = 0.0, **tables: Tensor) -> Context:
    random = torch.Generator().manual_seed(seed)

    def draw(spread: float = 1.5) -> Tensor:
        return spread * torch.randn(V, generator=random, dtype=torch.float64)

    rollout_V = draw()
    drawn = {name: draw().log_softmax(0) for name in ("teacher", "reference")}
    student_V = (rollout_V + drift * draw(1.0)).log_softmax(0)
    return Context(student_V, rollout_V.log_softmax(0), {**drawn, **tables})


def expected_gradient(
    config: ObjectiveConfig,
    at: Context,
    top_k: int = V,
    sampler: str | Tensor = "rollout",
    behavior_V: Tensor | None = None,
) -> Tensor:
    """Gradient by the student's logits, [V], in expectation over the sampler's token.

    `behavior_V` is what the cache says of the sampler; None for a cache that says nothing.
    """
    logits_V = at.student_V.clone().requires_grad_()
    named = {"rollout": at.rollout_V, "student": at.student_V}
    batch = expectation_batch(at, top_k, named[sampler] if isinstance(sampler, str) else sampler)
    batch = replace(batch, behavior_logprobs_N=behavior_V)
    logprobs_NV = logits_V.log_softmax(0).expand(V, V)
    ids = {name: batch.signals[name].topk_ids_NK for name in needs(config).supports}
    student = StudentTokens(
        logprobs_NV.diagonal(),
        torch.zeros(V, dtype=torch.float64),
        {name: logprobs_NV.gather(1, ids_NK) for name, ids_NK in ids.items()},
        {name: tail_of(logprobs_NV, ids_NK) for name, ids_NK in ids.items()},
    )
    (gradient_V,) = torch.autograd.grad(compute_loss(config, batch, student).value, logits_V)
    return gradient_V


def expectation_batch(at: Context, top_k: int, sampler_V: Tensor) -> RolloutBatch:
    every = torch.arange(V)
    signals = {}
    for name, table_V in at.tables.items():
        table_NV = table_V.expand(V, V)
        topk_NK, ids_NK = table_NV.topk(top_k, dim=1)
        signals[name] = SignalBatch(table_V, ids_NK, topk_NK, tail_of(table_NV, ids_NK))
    return RolloutBatch(
        ids_N=every,
        row_N=every,
        index_N=torch.zeros(V, dtype=torch.int64),
        loss_mask_N=torch.ones(V, dtype=torch.bool),
        turns_N=torch.zeros(V, dtype=torch.int64),
        ref_logprobs_N=at.rollout_V,
        signals=signals,
        lengths_R=torch.ones(V, dtype=torch.int64),
        rewards_R=torch.zeros(V),
        is_truncated_R=torch.zeros(V, dtype=torch.bool),
        groups_R=every,
        domains=(None,) * V,
        rollout_ids=tuple(map(str, range(V))),
        totals=BatchTotals(V, V),
        longest=1,
        num_turns=1,
        prepared_R={"main/weight": V * sampler_V.exp()},
    )


def score_rows(student_V: Tensor) -> Tensor:
    """Row a is the gradient of log s(a) by the logits."""
    return torch.eye(V, dtype=torch.float64) - student_V.exp()


PLAIN = objective(target={"kind": "log_ratio", "clip": None})
RATIO = objective(target={"kind": "log_ratio", "clip": None}, token_weights=[{"kind": "ratio", "cap": 1e9}])
REVERSE_KL = objective(target={"kind": "divergence"})
