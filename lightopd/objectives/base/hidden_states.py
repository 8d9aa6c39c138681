"""Signals that keep hidden states: their model over the whole vocabulary, wherever it is asked for.

A hidden state and the head of the model that scored give its log-probability of any token. Two things are
made of them: divergences over the whole vocabulary, and a top-k with the mass outside it, for all parts that
read one.
"""

# N = tokens, K = support, E = hidden size of the model that scored, D = of the student, V = vocabulary; nats

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightopd.errors import ConfigError
from lightopd.kernels.selected_logprobs import TokenLogprobs, selected_logprobs
from lightopd.kernels.two_heads import Frozen, divergence_of_heads
from lightopd.models.head import Head
from lightopd.objectives.base.batch import SignalBatch
from lightopd.objectives.base.closed_forms import closed_form
from lightopd.objectives.base.divergences import outcome_terms
from lightopd.objectives.base.part import Needs, Outcomes, WholeTail
from lightopd.schemas.objectives.targets import Entries


@dataclass(frozen=True, slots=True)
class HiddenSignal:
    """A signal that keeps hidden states, and what an objective makes of them."""

    name: str
    head: Head
    """Of the model that scored, on the device."""
    entries: Entries | None
    """The top-k that is made; None where no part reads one."""
    tails: tuple[WholeTail, ...]
    """What is compared over the whole vocabulary."""


def hidden_signals(wanted: Needs, heads: Mapping[str, Head], num_vocab: int) -> tuple[HiddenSignal, ...]:
    """What an objective makes of hidden states.

    Args:
        wanted: of `on_signals(needs(objective), ...)`.
        heads: by the name of a signal.
        num_vocab: width of the student's head.

    Raises:
        ConfigError: a head is not there, or is one of another vocabulary.
    """
    entries = dict(wanted.entries)
    return tuple(
        HiddenSignal(
            name,
            _checked_head(name, heads, num_vocab),
            entries.get(name),
            tuple(tail for tail in wanted.tails if tail.signal == name and tail.target.tail == "whole"),
        )
        for name in wanted.hidden
    )


def _checked_head(name: str, heads: Mapping[str, Head], num_vocab: int) -> Head:
    if name not in heads:
        raise ConfigError(
            f"the objective reads the hidden states of signal {name}, whose head is not given; give it, or "
            f"choose another tail"
        )
    if len(heads[name].weight_VD) != num_vocab:
        raise ConfigError(
            f"the head of signal {name} has {len(heads[name].weight_VD)} vocabulary entries, the student's "
            f"has {num_vocab}; hidden states serve students of one vocabulary: score a top-k for this one"
        )
    return heads[name]


def heads_on(
    heads: Mapping[str, Head], device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, Head]:
    """The heads with their tensors on the device; one that several signals share is there once.

    Args:
        heads: by the name of a signal.
        device: of the student.
        dtype: that the products of the step are made in, for the weights; None leaves them as they are.
    """
    moved: dict[int, Head] = {}
    for head in heads.values():
        if id(head) not in moved:
            bias_V = None if head.bias_V is None else head.bias_V.to(device)
            moved[id(head)] = replace(head, weight_VD=head.weight_VD.to(device, dtype), bias_V=bias_V)
    return {name: moved[id(head)] for name, head in heads.items()}


@dataclass(frozen=True, slots=True)
class Live:
    """The student at the response tokens of a micro-batch."""

    hidden_ND: Tensor
    head: Head


def teacher_hidden(signal: HiddenSignal, cached: SignalBatch) -> Tensor:
    """The hidden states [N, E] of a micro-batch, in the head's own format where a GPU multiplies in it.

    Raises:
        ConfigError: the batch has none, or they are not of the head's size.
    """
    hidden_NE, size = cached.hidden_ND, signal.head.weight_VD.shape[1]
    if hidden_NE is None:
        raise ConfigError(f"the batch has no hidden states of signal {signal.name}; read them from its cache")
    if hidden_NE.shape[1] != size:
        raise ConfigError(
            f"signal {signal.name} has hidden states of {hidden_NE.shape[1]} numbers, its head reads {size}; "
            f"the head is not this signal's: run `lightopd verify`"
        )
    dtype = signal.head.weight_VD.dtype
    is_half = hidden_NE.is_cuda and dtype in (torch.float16, torch.bfloat16)
    return hidden_NE.to(dtype) if is_half else hidden_NE


@torch.no_grad()
def rebuilt(signal: HiddenSignal, cached: SignalBatch, live: Live) -> SignalBatch:
    """The signal with a top-k and the mass outside it, made from its hidden states; most likely first."""
    assert signal.entries is not None
    hidden_NE, head = teacher_hidden(signal, cached), signal.head
    top_k = min(signal.entries.top_k, len(head.weight_VD))
    chosen = (
        _select(hidden_NE, head, own_top_k=top_k)
        if signal.entries.of == "teacher"
        else _select(live.hidden_ND, live.head, own_top_k=top_k)
    )
    ids_NK = chosen.topk_ids_NK
    assert ids_NK is not None
    found = _select(hidden_NE, head, ids_NK)
    return in_order(cached, ids_NK, found.logprobs_NM, found.tail_logprobs_NS[:, 0])


def in_order(cached: SignalBatch, ids_NK: Tensor, logprobs_NK: Tensor, tail_N: Tensor) -> SignalBatch:
    """The signal with these entries, most likely first."""
    ordered_NK, order_NK = logprobs_NK.float().sort(dim=1, descending=True, stable=True)
    return replace(
        cached,
        topk_ids_NK=ids_NK.gather(1, order_NK),
        topk_logprobs_NK=ordered_NK,
        tail_logprobs_N=tail_N.float(),
    )


def whole_divergences(signal: HiddenSignal, cached: SignalBatch, live: Live) -> dict[str, Tensor]:
    """Each divergence over the whole vocabulary, [N], differentiable, by the key of its tail."""
    if not signal.tails:
        return {}
    hidden_NE = teacher_hidden(signal, cached)
    normalisers: dict[tuple[str, float], Tensor] = {}

    def normaliser(side: str, hidden_NX: Tensor, head: Head) -> Tensor:
        if (side, head.temperature) not in normalisers:
            with torch.no_grad():
                normalisers[side, head.temperature] = _select(hidden_NX, head).logsumexp_N
        return normalisers[side, head.temperature]

    found = {}
    for tail in signal.tails:
        target = tail.target
        head = _tempered(signal.head, target.temperature * target.teacher_temperature)
        own = _tempered(live.head, target.temperature)
        frozen = Frozen(
            hidden_NE,
            head.weight_VD,
            normaliser("teacher", hidden_NE, head),
            bias_V=head.bias_V,
            softcap=head.softcap,
            temperature=head.temperature,
        )
        value_N = divergence_of_heads(
            live.hidden_ND,
            own.weight_VD,
            normaliser("student", live.hidden_ND, own),
            frozen,
            closed_form(target),
            bias_V=own.bias_V,
            softcap=own.softcap,
            temperature=own.temperature,
        )
        found[tail.key] = value_N * target.temperature**2
    return found


def whole_in_full(tail: WholeTail, teacher_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """One of `whole_divergences` from both sides' logits, [N]."""
    target = tail.target
    outcomes = Outcomes(
        (teacher_NV / (target.temperature * target.teacher_temperature)).log_softmax(-1),
        (logits_NV / target.temperature).log_softmax(-1),
        torch.ones_like(logits_NV, dtype=torch.bool),
    )
    return outcome_terms(target, outcomes).sum(-1) * target.temperature**2


def _tempered(head: Head, temperature: float) -> Head:
    return replace(head, temperature=head.temperature * temperature)


def _select(
    hidden_NX: Tensor, head: Head, ids_NM: Tensor | None = None, *, own_top_k: int = 0
) -> TokenLogprobs:
    """Of a head: the normaliser; log-probabilities of ids and of all else; its own most likely tokens."""
    none_N0 = torch.empty(len(hidden_NX), 0, dtype=torch.int64, device=hidden_NX.device)
    return selected_logprobs(
        hidden_NX,
        head.weight_VD,
        none_N0 if ids_NM is None else ids_NM,
        member_NSM=None if ids_NM is None else torch.ones_like(ids_NM, dtype=torch.bool)[:, None],
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=head.temperature,
        own_top_k=own_top_k,
    )
