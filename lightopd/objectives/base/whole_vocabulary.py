"""A divergence over the whole vocabulary: what the tokens outside a signal's support add to it.

There the teacher is a shape, scaled to what the signal says is left: T_v = r c_v / C, with r the mass outside
the support, c the shape, and C the share of the shape that lies outside. The support is compared as ever.
Forward and reverse KL need no more than sums against fixed vectors, which the student's own pass over the
vocabulary makes (`linear_tails`); all other divergences walk over the vocabulary once more.
"""

# N = tokens, K = support, M = K + 1 outcomes, D = hidden size, V = vocabulary; nats

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightopd.errors import ConfigError
from lightopd.kernels.outside_terms import Fixed, outside_terms
from lightopd.kernels.selected_logprobs import TokenLogprobs
from lightopd.models.head import Head
from lightopd.objectives.base.batch import SignalBatch
from lightopd.objectives.base.closed_forms import closed_form
from lightopd.objectives.base.divergences import FLOOR, normalised_teacher, outcome_terms
from lightopd.objectives.base.linear_tails import (
    LinearSums,
    Vectors,
    at_ids,
    forward_kl_outside,
    linear_kind,
    reverse_kl_outside,
    stack_vectors,
)
from lightopd.objectives.base.part import Outcomes, WholeTail
from lightopd.objectives.base.teacher import pair_outcomes


@dataclass(frozen=True, slots=True)
class SpreadTail:
    """A term's tail with its shape."""

    what: WholeTail
    log_shape_V: Tensor
    """float32, finite; exp of it sums to one."""


class LiveSide(NamedTuple):
    """The student at the response tokens of a micro-batch."""

    hidden_ND: Tensor
    """Last hidden states, any float dtype."""
    head: Head
    logsumexp_N: Tensor
    """Normaliser of its logits; differentiable."""
    student_NM: Tensor
    """Log-probabilities on the support, then of all else; differentiable."""
    linear: LinearSums | None
    """For forward and reverse KL; None for a divergence that walks."""


def fixed_vectors(tails: Sequence[SpreadTail]) -> Vectors:
    """What `selected_logprobs` sums against for these tails; nothing where none is linear."""
    return stack_vectors([(linear_kind(tail.what.target), tail.log_shape_V) for tail in tails])


def linear_sums(tails: Sequence[SpreadTail], selected: TokenLogprobs) -> list[LinearSums | None]:
    """Each tail's own sums, of `selected_logprobs` with their `fixed_vectors`; None for one that walks."""
    kinds = [linear_kind(tail.what.target) for tail in tails]
    if selected.fixed is None:
        return [None] * len(tails)
    averages, weighed = selected.fixed.averages_NF.unbind(1), selected.fixed.weighed_NG.unbind(1)
    found: list[LinearSums | None] = []
    for place, kind in enumerate(kinds):
        column = kinds[:place].count(kind)
        if kind == "reverse_kl":
            found.append(LinearSums(selected.logsumexp_N, selected.fixed.entropy_N, averages[column]))
        elif kind == "forward_kl":
            found.append(LinearSums(selected.logsumexp_N, None, weighed[column]))
        else:
            found.append(None)
    return found


def spread_tails(
    tails: Sequence[WholeTail], shapes: Mapping[str, NDArray[np.float32]], num_vocab: int
) -> tuple[SpreadTail, ...]:
    """The tails that an objective needs, with their shapes; those of hidden states are left out.

    Args:
        tails: of `needs(objective)`.
        shapes: by the name of a signal; read for `shaped` tails.
        num_vocab: width of the student's head.

    Raises:
        ConfigError: a shape is not there, or is one of another vocabulary.
    """
    spread = (tail for tail in tails if tail.target.tail != "whole")
    return tuple(SpreadTail(tail, _log_shape(tail, shapes, num_vocab)) for tail in spread)


def _log_shape(tail: WholeTail, shapes: Mapping[str, NDArray[np.float32]], num_vocab: int) -> Tensor:
    if tail.target.tail == "uniform":
        return torch.full((num_vocab,), 1 / num_vocab).log()
    if tail.signal not in shapes:
        raise ConfigError(
            f"term {tail.term} needs the shape of signal {tail.signal}'s tail; give it, or set tail: bucket"
        )
    shape_V = torch.from_numpy(shapes[tail.signal])
    if len(shape_V) != num_vocab:
        raise ConfigError(
            f"the shape of signal {tail.signal}'s tail has {len(shape_V)} entries, the student's head has "
            f"{num_vocab}; score the signal again for this student, or set tail: bucket"
        )
    return shape_V.log().clamp(min=FLOOR)


def outside_support(tail: SpreadTail, signal: SignalBatch, live: LiveSide) -> Tensor:
    """Sum of the divergence's terms over the vocabulary outside the support, [N], differentiable."""
    tail = replace(tail, log_shape_V=tail.log_shape_V.to(live.hidden_ND.device))
    with torch.autocast(live.hidden_ND.device.type, enabled=False):
        outcomes, shift_N = _teacher_outside(tail, signal, live.student_NM)
        if live.linear is None:
            value_N = _by_walk(tail, signal.topk_ids_NK, shift_N, live)
        else:
            kind = linear_kind(tail.what.target)
            outside = forward_kl_outside if kind == "forward_kl" else reverse_kl_outside
            value_N = outside(tail.log_shape_V, signal.topk_ids_NK, outcomes, shift_N, live.linear)
        return torch.where(outcomes.is_real_NM[:, -1], value_N, 0.0)


def outside_in_full(tail: SpreadTail, signal: SignalBatch, student_NM: Tensor, logprobs_NV: Tensor) -> Tensor:
    """`outside_support` of a student whose log-probabilities are there as a whole."""
    tail = replace(tail, log_shape_V=tail.log_shape_V.to(logprobs_NV.device))
    outcomes, shift_N = _teacher_outside(tail, signal, student_NM)
    teacher_NV = shift_N[:, None] + tail.log_shape_V
    terms_NV = outcome_terms(tail.what.target, Outcomes(teacher_NV, logprobs_NV, _EVERYWHERE))
    hits_NV = torch.zeros_like(logprobs_NV, dtype=torch.int32)
    ids_NK = signal.topk_ids_NK
    hits_NV.scatter_add_(1, ids_NK.clamp(min=0), (ids_NK >= 0).int())
    value_N = terms_NV.masked_fill(hits_NV > 0, 0.0).sum(1)
    return torch.where(outcomes.is_real_NM[:, -1], value_N, 0.0)


def _teacher_outside(tail: SpreadTail, signal: SignalBatch, student_NM: Tensor) -> tuple[Outcomes, Tensor]:
    """Teacher and student on the outcomes, and log(r / C): 0 where nothing is outside."""
    outcomes = normalised_teacher(pair_outcomes(signal, student_NM))
    log_outside_N = _log_shape_outside(tail.log_shape_V, signal.topk_ids_NK)
    has_tail_N = outcomes.is_real_NM[:, -1]
    return outcomes, torch.where(has_tail_N, outcomes.teacher_NM[:, -1] - log_outside_N, 0.0)


def _log_shape_outside(log_shape_V: Tensor, ids_NK: Tensor) -> Tensor:
    """Log of the shape's mass outside the ids, [N]; in float64, because it is one minus a sum."""
    inside_NK = at_ids(log_shape_V.double().exp(), ids_NK)
    outside_N = (1 - inside_NK.sum(1)).clamp(min=torch.finfo(torch.float32).tiny)
    return outside_N.log().to(log_shape_V.dtype)


def _by_walk(tail: SpreadTail, ids_NK: Tensor, shift_N: Tensor, live: LiveSide) -> Tensor:
    return outside_terms(
        live.hidden_ND,
        live.head.weight_VD,
        Fixed(ids_NK, shift_N, tail.log_shape_V),
        live.logsumexp_N,
        closed_form(tail.what.target),
        bias_V=live.head.bias_V,
        softcap=live.head.softcap,
        temperature=live.head.temperature,
    )


_EVERYWHERE = torch.ones((), dtype=torch.bool)
"""The terms of a divergence read no mask."""
