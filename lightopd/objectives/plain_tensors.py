"""An objective on plain tensors: logits in, loss out, for a notebook or a trainer of one's own.

The trainer's own path never holds [tokens, vocabulary]; this one does, and gives the same numbers.
"""

# N = response tokens of all rollouts end to end, V = student vocabulary, K = widest support; nats

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightopd.errors import ConfigError
from lightopd.models.head import Head
from lightopd.objectives.base.batch import RolloutBatch, SignalBatch, StudentTokens
from lightopd.objectives.base.hidden_states import (
    HiddenSignal,
    hidden_signals,
    in_order,
    teacher_hidden,
    whole_in_full,
)
from lightopd.objectives.base.whole_vocabulary import SpreadTail, outside_in_full, spread_tails
from lightopd.objectives.loss import Loss, collect_step_sums, compute_loss
from lightopd.objectives.requirements import needs, on_signals
from lightopd.schemas.objectives.objective import ObjectiveConfig


def loss_from_logits(
    objective: ObjectiveConfig | Mapping[str, Any],
    batch: RolloutBatch,
    logits_NV: Tensor,
    shapes: Mapping[str, NDArray[np.float32]] | None = None,
    heads: Mapping[str, Head] | None = None,
) -> Loss:
    """The loss of a batch under the student's logits; `.value` has a gradient.

    Args:
        objective: as `objective:` in a config, such as {"target": {"kind": "log_ratio"}}.
        batch: cached side, from `open_cache(...).batches()`.
        logits_NV: raw logits that predict each response token, any float dtype; promoted to float32.
        shapes: by signal, from `open_cache(...).tail_shape(NAME)`; read where a term's tail is shaped.
        heads: by signal, from `open_cache(...).head(NAME)`; read where hidden states are.

    Raises:
        ConfigError: the objective needs the whole cache or a state between steps, or a signal that the
            batch does not hold; or the logits are not one row for each token.
    """
    config = (
        objective if isinstance(objective, ObjectiveConfig) else ObjectiveConfig.model_validate(objective)
    )
    wanted = needs(config)
    if wanted.prepared or wanted.state:
        raise ConfigError(
            "this objective reads the whole cache before the first step, or keeps a state between steps; "
            "train with it through `lightopd train`"
        )
    lacking = [name for name in wanted.signals if name not in batch.signals]
    if lacking:
        there = ", ".join(batch.signals) or "none"
        raise ConfigError(f"the objective reads signal {lacking[0]!r}; the batch holds: {there}")
    kept = {n: s.topk_ids_NK.shape[1] for n, s in batch.signals.items() if s.hidden_ND is not None}
    hidden = hidden_signals(on_signals(wanted, kept), heads or {}, logits_NV.shape[1])
    teachers = {each.name: _teacher_logits(each, batch.signals[each.name]) for each in hidden}
    made = {
        each.name: _rebuilt(each, batch.signals[each.name], teachers[each.name], logits_NV)
        for each in hidden
        if each.entries
    }
    batch = replace(batch, signals=batch.signals | made)
    student = student_tokens(batch, logits_NV, wanted.supports)
    tails = spread_tails(wanted.tails, shapes or {}, logits_NV.shape[1])
    outside_N = {tail.what.key: _outside(tail, batch, student, logits_NV) for tail in tails}
    for each in hidden:
        for whole in each.tails:
            outside_N[whole.key] = whole_in_full(whole, teachers[each.name], logits_NV.float())
    student = replace(student, outside_N=outside_N)
    with torch.no_grad():
        step_sums = collect_step_sums(config, batch, student) if wanted.step_sums else None
    return compute_loss(config, batch, student, step_sums)


def _teacher_logits(signal: HiddenSignal, cached: SignalBatch) -> Tensor:
    with torch.no_grad():
        return signal.head.logits(teacher_hidden(signal, cached))


@torch.no_grad()
def _rebuilt(signal: HiddenSignal, cached: SignalBatch, teacher_NV: Tensor, logits_NV: Tensor) -> SignalBatch:
    assert signal.entries is not None
    side_NV = teacher_NV if signal.entries.of == "teacher" else logits_NV.float()
    ids_NK = side_NV.topk(min(signal.entries.top_k, side_NV.shape[1])).indices
    logprobs_NK, tail_N = _on_support(teacher_NV.log_softmax(dim=-1), ids_NK)
    return in_order(cached, ids_NK, logprobs_NK, tail_N)


def student_tokens(
    batch: RolloutBatch, logits_NV: Tensor, supports: tuple[str, ...] | None = None
) -> StudentTokens:
    """The live side of a batch, from its logits.

    Args:
        batch: cached side.
        logits_NV: raw logits that predict each response token.
        supports: signals on whose top-k the student is evaluated; None means all of the batch's.

    Raises:
        ConfigError: the logits are not one row for each token.
    """
    if logits_NV.dim() != 2 or len(logits_NV) != len(batch.ids_N):
        raise ConfigError(
            f"logits {tuple(logits_NV.shape)} must have one row for each of the {len(batch.ids_N)} response "
            "tokens"
        )
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    names = tuple(batch.signals) if supports is None else supports
    on_supports = {name: _on_support(logprobs_NV, batch.signals[name].topk_ids_NK) for name in names}
    return StudentTokens(
        logprobs_N=logprobs_NV.gather(1, batch.ids_N[:, None])[:, 0],
        entropies_N=-(logprobs_NV.detach().exp() * logprobs_NV.detach()).sum(-1),
        topk_logprobs_NK={name: pair[0] for name, pair in on_supports.items()},
        tail_logprobs_N={name: pair[1] for name, pair in on_supports.items()},
    )


def _outside(tail: SpreadTail, batch: RolloutBatch, student: StudentTokens, logits_NV: Tensor) -> Tensor:
    name = tail.what.signal
    student_NM = torch.cat([student.topk_logprobs_NK[name], student.tail_logprobs_N[name][:, None]], dim=1)
    return outside_in_full(tail, batch.signals[name], student_NM, logits_NV.float().log_softmax(dim=-1))


def _on_support(logprobs_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities on the ids, 0 at padding; and the log of the mass outside them, summed there."""
    is_real_NK = ids_NK >= 0
    taken_NK = torch.where(is_real_NK, logprobs_NV.gather(1, ids_NK.clamp(min=0)), 0.0)
    is_inside_NV = torch.zeros_like(logprobs_NV, dtype=torch.bool)
    rows_NK = torch.arange(len(ids_NK), device=ids_NK.device)[:, None].expand_as(ids_NK)
    is_inside_NV[rows_NK[is_real_NK], ids_NK[is_real_NK]] = True
    has_tail_N = ~is_inside_NV.all(-1)  # a row of minus infinities alone would have a gradient of NaN
    outside_NV = logprobs_NV.masked_fill(is_inside_NV & has_tail_N[:, None], -torch.inf)
    return taken_NK, torch.where(has_tail_N, outside_NV.logsumexp(-1), -torch.inf)
