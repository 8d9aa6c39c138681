"""From hidden states to log-probabilities, top-k and tail, one slice of logits at a time.

N = positions, C = positions in one slice, D = hidden size, K = top-k, S = support ids, M = S + K,
V = vocabulary; nats throughout.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightopd.engines.hf.hidden_states import to_device
from lightopd.models.head import Head
from lightopd.schemas.records import Floats, HiddenCodes, Ids, Support

# A product of hidden states and output layer wants many positions, or the layer is read too often. The passes
# over its result want few, so that they find it in the processor's cache. Measured on a CPU; a GPU has the
# memory for larger products and is slowed by small kernels.
PRODUCT_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
SLICE_BYTES = {"cpu": 6 << 20, "cuda": 512 << 20}
BLOCK = 8
PADDING = -1
"""Where a position has fewer support ids than the widest one."""


class PositionScores(NamedTuple):
    """Scores of positions laid end to end."""

    logprobs_N: Floats
    topk_counts_N: Ids
    topk_ids_NK: Ids
    topk_logprobs_NK: Floats
    tail_logprobs_N: Floats
    hidden_ND: HiddenCodes | None = None
    """As it is stored, where it was requested."""
    hidden_scales_N: Floats | None = None


class PendingScores:
    """Scores on their way to the host, so that the device goes on with the next batch meanwhile.

    On a GPU they are copied into pinned memory behind the work that makes them; an event says when they are
    there. On a CPU they are there.
    """

    def __init__(
        self, slices: Sequence[tuple[Tensor, ...]], hidden: tuple[Tensor, Tensor | None] | None = None
    ) -> None:
        """Slices of the fields of `PositionScores`, in order; codes and scales of the hidden states."""
        logprobs_N, counts_N, ids_NK, topk_NK, tail_N = map(torch.cat, zip(*slices, strict=True))
        self._fields = [
            _leaving(each) for each in (logprobs_N, counts_N.int(), ids_NK.int(), topk_NK, tail_N)
        ]
        self._hidden = [None if each is None else _leaving(each) for each in hidden or (None, None)]
        self._event = torch.cuda.Event() if logprobs_N.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def arrived(self) -> PositionScores:
        """The scores as numpy, waited for."""
        if self._event is not None:
            self._event.synchronize()
        logprobs_N, counts_N, ids_NK, topk_NK, tail_N = (each.numpy() for each in self._fields)
        codes_ND, scales_N = (None if each is None else each.numpy() for each in self._hidden)
        if codes_ND is not None and codes_ND.dtype == np.int16:
            codes_ND = codes_ND.view(np.uint16)
        return PositionScores(logprobs_N, counts_N, ids_NK, topk_NK, tail_N, codes_ND, scales_N)


def _leaving(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def score_positions(
    head: Head,
    hidden_ND: Tensor,
    ids_N: Tensor,
    top_k: int,
    min_probability: float,
    kept: tuple[Tensor, Tensor | None] | None = None,
) -> PendingScores:
    """Scores under the full-vocabulary softmax in float32; non-finite logits give NaN log-probabilities.

    Args:
        head: the model's output layer.
        hidden_ND: what it reads, any float dtype.
        ids_N: int64, the token at each position, scored also where it is outside the top-k.
        top_k: 0 to V.
        min_probability: entries less likely than this count as tail.
        kept: codes and scales of the hidden states, where they are kept.
    """
    return PendingScores(
        [
            _score_slice(logits_CV, ids_N[rows], top_k, min_probability)
            for rows, logits_CV in logit_slices(head, hidden_ND)
        ],
        kept,
    )


def largest(values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, largest first, and their int64 columns; as `topk`, but faster.

    The k largest lie in the k blocks with the largest maxima, which are found the same way, so that only one
    pass goes over the whole row. NaN counts as largest.
    """
    width = values_NV.shape[1]
    num_blocks = width // BLOCK
    if not k or num_blocks < 2 * k:
        return values_NV.topk(k)
    # Block j is columns j, j + num_blocks, j + 2 num_blocks, ...: maxima are then taken over whole vectors.
    blocks_NBJ = values_NV[:, : num_blocks * BLOCK].view(-1, BLOCK, num_blocks)
    _, chosen_NK = largest(blocks_NBJ.amax(1), k)
    chosen_NBK = chosen_NK[:, None, :].expand(-1, BLOCK, -1)
    first_B = torch.arange(BLOCK, device=values_NV.device) * num_blocks
    candidates = blocks_NBJ.gather(2, chosen_NBK).flatten(1)
    columns = (chosen_NBK + first_B[:, None]).flatten(1)
    if width % BLOCK:
        rest = torch.arange(num_blocks * BLOCK, width, device=values_NV.device)
        candidates = torch.cat([candidates, values_NV[:, num_blocks * BLOCK :]], 1)
        columns = torch.cat([columns, rest.expand(len(columns), -1)], 1)
    top_NK, where_NK = candidates.topk(k)
    return top_NK, columns.gather(1, where_NK)


def logit_slices(head: Head, hidden_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits float32 [C, V] of all positions in turn; each is overwritten when the next is asked for."""
    row_bytes = 4 * head.weight_VD.shape[0]
    num_rows = min(len(hidden_ND), max(1, PRODUCT_BYTES[hidden_ND.device.type] // row_bytes))
    slice_rows = max(1, SLICE_BYTES[hidden_ND.device.type] // row_bytes)
    buffer_CV = hidden_ND.new_empty((num_rows, head.weight_VD.shape[0]), dtype=torch.float32)
    for start in range(0, len(hidden_ND), max(1, num_rows)):
        logits_CV = head.logits(hidden_ND[start : start + num_rows], out=buffer_CV)
        for first in range(0, len(logits_CV), slice_rows):
            part_CV = logits_CV[first : first + slice_rows]
            yield slice(start + first, start + first + len(part_CV)), part_CV


def _score_slice(logits_CV: Tensor, ids_C: Tensor, top_k: int, min_probability: float) -> tuple[Tensor, ...]:
    """Fields of `PositionScores` for one slice; the logits are overwritten.

    Everything is relative to the largest logit, so log-probabilities near zero keep their digits. The tail is
    a sum over the tokens outside the top-k and never 1 - sum, so it is exact where it is tiny.
    """
    top_CK, top_ids_CK = largest(logits_CV, min(top_k + 1, logits_CV.shape[1]))
    max_C1 = top_CK[:, :1]
    asked_C1 = logits_CV.gather(1, ids_C[:, None]) - max_C1
    kept_CK, kept_ids_CK = top_CK[:, :top_k] - max_C1, top_ids_CK[:, :top_k]
    rest_C1 = torch.full_like(max_C1, -math.inf)
    if top_k < logits_CV.shape[1]:
        logits_CV.scatter_(1, kept_ids_CK, -math.inf)
        rest_C1 = _log_sum_exp(logits_CV, top_CK[:, top_k:], top_ids_CK[:, top_k:]) - max_C1
    total_C1 = torch.cat([kept_CK, rest_C1], 1).logsumexp(1, keepdim=True)
    logprobs_CK, tail_C1 = kept_CK - total_C1, rest_C1 - total_C1
    is_kept_CK = torch.ones_like(logprobs_CK, dtype=torch.bool)
    if min_probability > 0:
        is_kept_CK = logprobs_CK >= math.log(min_probability)
        dropped_CK = logprobs_CK.masked_fill(is_kept_CK, -math.inf)
        tail_C1 = torch.cat([tail_C1, dropped_CK], 1).logsumexp(1, keepdim=True).clamp(max=0)
    return (asked_C1 - total_C1)[:, 0], is_kept_CK.sum(1), kept_ids_CK, logprobs_CK, tail_C1[:, 0]


def _log_sum_exp(logits_CV: Tensor, max_C1: Tensor, max_ids_C1: Tensor) -> Tensor:
    """logsumexp over each row, [C, 1], given its largest logit and where it is.

    `log_softmax` is a fused pass on every device, several times faster than `logsumexp`; at the largest logit
    it is minus the logarithm of the sum.
    """
    log_share_C1 = logits_CV.log_softmax(1).gather(1, max_ids_C1)
    return torch.where(max_C1 == -math.inf, max_C1, max_C1 - log_share_C1)


def tail_sums(head: Head, hidden_ND: Tensor, top_k: int, min_probability: float) -> Tensor:
    """Probabilities of the tokens that `score_positions` leaves out, added up over positions, float64 [V]."""
    total_V = torch.zeros(len(head.weight_VD), dtype=torch.float64, device=hidden_ND.device)
    for _, logits_CV in logit_slices(head, hidden_ND):
        shares_CV = logits_CV.softmax(1)
        kept_CK, ids_CK = largest(shares_CV, min(top_k, shares_CV.shape[1]))
        shares_CV.scatter_(1, ids_CK, torch.where(kept_CK < min_probability, kept_CK, 0.0))
        total_V += shares_CV.sum(0, dtype=torch.float64)
    return total_V


def support_ids(supports: list[Support], device: torch.device) -> Tensor:
    """Support of positions laid end to end, int64 [N, S], padded with -1."""
    counts_N = np.concatenate([support.counts for support in supports])
    padded_NS = np.full((len(counts_N), int(counts_N.max(initial=0))), PADDING, dtype=np.int64)
    padded_NS[np.arange(padded_NS.shape[1]) < counts_N[:, None]] = np.concatenate([s.ids for s in supports])
    return to_device(padded_NS, device)


def score_support(
    head: Head, hidden_ND: Tensor, ids_N: Tensor, support_NS: Tensor, top_k: int
) -> PendingScores:
    """Scores whose entries are the support's ids and the `top_k` most likely ones, most likely first.

    Args:
        head: the model's output layer.
        hidden_ND: what it reads, any float dtype.
        ids_N: int64, the token at each position.
        support_NS: int64, ids that are kept whatever their probability; -1 is padding.
        top_k: 0 to V.
    """
    return PendingScores(
        [
            _support_slice(logits_CV, ids_N[rows], support_NS[rows], top_k)
            for rows, logits_CV in logit_slices(head, hidden_ND)
        ]
    )


def _support_slice(logits_CV: Tensor, ids_C: Tensor, support_CS: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Fields of `PositionScores`; the tail is a sum over the tokens that are not kept, never 1 - sum."""
    logprobs_CV = logits_CV.log_softmax(1)
    width = logits_CV.shape[1]
    _, top_ids_CK = largest(logprobs_CV, top_k)
    is_again_CS = (support_CS[:, :, None] == top_ids_CK[:, None, :]).any(2)
    ids_CM = torch.cat([top_ids_CK, support_CS.masked_fill(is_again_CS, PADDING)], 1)
    is_padding_CM = ids_CM == PADDING
    is_kept_CV = torch.zeros((len(logits_CV), width + 1), dtype=torch.bool, device=logits_CV.device)
    is_kept_CV.scatter_(1, ids_CM.masked_fill(is_padding_CM, width), True)
    tail_C = logprobs_CV.masked_fill(is_kept_CV[:, :width], -torch.inf).logsumexp(1).clamp(max=0)
    kept_CM = logprobs_CV.gather(1, ids_CM.clamp(min=0)).masked_fill(is_padding_CM, -torch.inf)
    kept_CM, order_CM = (each[:, :width] for each in kept_CM.sort(stable=True, dim=1, descending=True))
    ids_CM, counts_C = ids_CM.gather(1, order_CM), (~is_padding_CM).sum(1)
    return logprobs_CV.gather(1, ids_C[:, None])[:, 0], counts_C, ids_CM, kept_CM, tail_C
