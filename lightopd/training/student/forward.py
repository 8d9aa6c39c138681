"""The student's forward pass over a micro-batch: from token ids to what an objective reads."""

# B = rows of a micro-batch, T = their padded length, N = response tokens, D = hidden size
# K = widest support of a signal, M = ids requested per position, S = supports

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.kernels.selected_logprobs import selected_logprobs
from lightopd.models.head import Head, head_of
from lightopd.objectives.base.batch import MetricSums, RolloutBatch, StudentTokens
from lightopd.objectives.base.hidden_states import HiddenSignal, Live, rebuilt, whole_divergences
from lightopd.objectives.base.whole_vocabulary import (
    LiveSide,
    SpreadTail,
    fixed_vectors,
    linear_sums,
    outside_support,
)
from lightopd.training.data.batches import Microbatch
from lightopd.training.distributed.fsdp import output_of
from lightopd.training.student.drift import drift_sums
from lightopd.training.student.packed_rows import decoder_inputs
from lightopd.training.student.router_loss import Routers


def student_tokens(
    student: PreTrainedModel,
    batch: Microbatch,
    supports: Sequence[str],
    tails: Sequence[SpreadTail] = (),
    hidden: Sequence[HiddenSignal] = (),
) -> StudentTokens:
    """What the student says now about every response token, with gradients; see `evaluate_tokens`."""
    output = output_of(student, use_cache=False, **decoder_inputs(student, batch))
    return _read(student, output, batch, supports, tails, hidden)


def routed_tokens(
    student: PreTrainedModel,
    batch: Microbatch,
    supports: Sequence[str],
    tails: Sequence[SpreadTail] = (),
    hidden: Sequence[HiddenSignal] = (),
) -> tuple[StudentTokens, Routers]:
    """`student_tokens`, and the logits of the routers that the tokens passed."""
    output = _routed_output(student, batch)
    return _read(student, output, batch, supports, tails, hidden), output.router_logits


def routers_of(student: PreTrainedModel, batch: Microbatch) -> Routers:
    """The routers' logits alone, without a look at the output layer."""
    routers: Routers = _routed_output(student, batch).router_logits
    return routers


def _routed_output(student: PreTrainedModel, batch: Microbatch) -> Any:
    return output_of(student, use_cache=False, output_router_logits=True, **decoder_inputs(student, batch))


def _read(
    student: PreTrainedModel,
    output: Any,
    batch: Microbatch,
    supports: Sequence[str],
    tails: Sequence[SpreadTail],
    hidden: Sequence[HiddenSignal],
) -> StudentTokens:
    hidden_ND = output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions_N)
    return evaluate_tokens(hidden_ND, head_of(student), batch.rollouts, supports, tails, hidden)


def evaluate_tokens(
    hidden_ND: Tensor,
    head: Head,
    rollouts: RolloutBatch,
    supports: Sequence[str],
    tails: Sequence[SpreadTail] = (),
    hidden: Sequence[HiddenSignal] = (),
) -> StudentTokens:
    """Log-probabilities of sampled tokens and of the supports' tokens, and what lies outside each support.

    Args:
        hidden_ND: last hidden state before each response token, any float dtype.
        head: the student's output layer.
        rollouts: the cached side.
        supports: names of the signals whose top-k is read.
        tails: what is compared token by token outside a support; each is of a signal in `supports`.
        hidden: signals that keep hidden states, and what is made of them.
    """
    hidden_ND, weight_VD = _in_compute_format(hidden_ND, head.weight_VD)
    head, vectors = replace(head, weight_VD=weight_VD), fixed_vectors(tails)
    own = Live(hidden_ND, head)
    made = {each.name: rebuilt(each, rollouts.signals[each.name], own) for each in hidden if each.entries}
    signals = rollouts.signals | made
    blocks = [rollouts.ids_N[:, None], *(signals[name].topk_ids_NK for name in supports)]
    widths = [block.shape[1] for block in blocks]
    ids_NM = torch.cat(blocks, dim=1)
    selected = selected_logprobs(
        hidden_ND,
        head.weight_VD,
        ids_NM,
        member_NSM=_members(ids_NM, widths),
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=head.temperature,
        averaged_FV=vectors.averaged_FV,
        weighing_GV=vectors.weighing_GV,
    )
    sampled_N1, *on_supports = torch.split(selected.logprobs_NM, widths, dim=1)
    topk_NK = dict(zip(supports, on_supports, strict=True))
    tail_N = dict(zip(supports, selected.tail_logprobs_NS.unbind(1), strict=True))
    outside_N = {}
    for tail, linear in zip(tails, linear_sums(tails, selected), strict=True):
        name = tail.what.signal
        student_NM = torch.cat([topk_NK[name], tail_N[name][:, None]], dim=1)
        live = LiveSide(hidden_ND, head, selected.logsumexp_N, student_NM, linear)
        outside_N[tail.what.key] = outside_support(tail, signals[name], live)
    for each in hidden:
        outside_N |= whole_divergences(each, rollouts.signals[each.name], own)
    return StudentTokens(
        logprobs_N=sampled_N1.squeeze(1),
        entropies_N=selected.entropy_N,
        topk_logprobs_NK=topk_NK,
        tail_logprobs_N=tail_N,
        outside_N=outside_N,
        rebuilt=made,
    )


def student_sums(rollouts: RolloutBatch, student: StudentTokens) -> MetricSums:
    """The student's entropy and its drift from the one at rollout, as sums over the trained tokens."""
    mask_N = rollouts.loss_mask_N.double()
    sums: MetricSums = {"entropy": ((student.entropies_N.double() * mask_N).sum(), mask_N.sum())}
    if rollouts.ref_logprobs_N is not None:
        ref_N, behavior_N = rollouts.ref_logprobs_N, rollouts.behavior_logprobs_N
        sums |= drift_sums(student.logprobs_N, ref_N, behavior_N, rollouts.loss_mask_N)
    return sums


def _members(ids_NM: Tensor, widths: Sequence[int]) -> Tensor | None:
    """bool [N, S, M]: the columns that belong to each support; None when there is none."""
    if len(widths) == 1:
        return None
    # Filled on the device: a tensor made on the host would have to be waited for.
    member_SM = torch.zeros(len(widths) - 1, ids_NM.shape[1], dtype=torch.bool, device=ids_NM.device)
    ends = list(accumulate(widths))
    for support, (start, end) in enumerate(pairwise(ends)):
        member_SM[support, start:end] = True
    return member_SM.expand(len(ids_NM), -1, -1)


def _in_compute_format(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of the logits in the format that the pass computes in.

    Under mixed precision the last hidden states are float32, as the residual stream is, but every other
    product of the pass has factors in half precision; in float32 this one would cost more than all the rest.
    On a GPU the head follows the hidden states; on a CPU the kernel's products are float32 in any case.
    """
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return hidden_ND.to(dtype), weight_VD.to(dtype)
    return hidden_ND, weight_VD.to(hidden_ND.dtype) if hidden_ND.is_cuda else weight_VD
