"""Log-probabilities of a few tokens under the current student, straight from hidden states and output head.

Every objective needs a handful of values per position: the sampled token, the cached top-k of each signal,
and the mass outside them. This computes them, with gradients, without an [N, V] tensor in either direction.
The backward pass recomputes the logits tile by tile, so memory beyond the gradients is a few tiles.
"""

# N = positions, D = hidden size, V = vocabulary, K = own top-k
# M = ids requested per position, S = tail sets, U = slots for the distinct ids among the M (so U = M)
# F = vectors averaged by the student, G = vectors that average its logits

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightopd.kernels.fixed_sums import FixedSums, Slots, add_gradient, fixed_sums, vectors_for
from lightopd.kernels.tile_types import FLOOR, Inputs, LogitGradient, Vectors, VocabularySums, Walk
from lightopd.kernels.vocabulary_walk import propagate, vocabulary_sums

PADDING_ID = -1
# Positions and vocabulary entries per tile. On CPU the two buffers of this size stay in the last-level cache
# between operations, and products this large run at full speed; half or twice a size is within 5 percent.
CPU_TILE = (1024, 2048)
# A float32 tile of 32 MiB, or of 16 for few positions, fits into the second-level cache of a large GPU, and
# the product that makes it has enough blocks for every processor.
CUDA_TILE = (2048, 4096)
FEW_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What `selected_logprobs` returns, in float32 (float64 for float64 inputs), in nats."""

    logprobs_NM: Tensor
    """Log-probability of each id requested; 0.0 where the id is padding. Differentiable."""
    tail_logprobs_NS: Tensor
    """Log of the mass outside each set. Differentiable; minus infinity and zero gradient if there is none."""
    logsumexp_N: Tensor
    """Normaliser of the logits after softcap and temperature. Differentiable."""
    entropy_N: Tensor
    """Entropy of the full distribution, 0 to log V. Detached."""
    topk_ids_NK: Tensor | None
    """int64, the student's own most likely tokens, most likely first; None unless requested."""
    topk_logprobs_NK: Tensor | None
    """Their log-probabilities. Detached; None unless requested."""
    fixed: FixedSums | None = None
    """Sums against fixed vectors. Differentiable; None unless requested."""


def selected_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    ids_NM: Tensor,
    *,
    member_NSM: Tensor | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    own_top_k: int = 0,
    averaged_FV: Tensor | None = None,
    weighing_GV: Tensor | None = None,
    chunk_tokens: int | None = None,
    tile_vocab: int | None = None,
    fused: bool | None = None,
) -> TokenLogprobs:
    """Log-probabilities of chosen ids, and of the mass outside sets of them, without full logits.

    The logits are softcap * tanh((hidden @ head.T + bias) / softcap) / temperature. Products and sums run in
    float32 (float64 if any input is float64), and half-precision inputs are converted tile by tile. Only on
    CUDA do bfloat16 factors stay as they are: the product still comes out in float32, but the gradient by the
    logits is rounded to bfloat16 before it is multiplied. Autocast has no effect here.

    Args:
        hidden_ND: last hidden states, after the final norm; any float dtype.
        head_VD: output projection; any float dtype. It may be the embedding too, the gradients then add up.
        ids_NM: int64, 0 to V - 1, or -1 for padding. M may be 0, and an id may occur more than once.
        member_NSM: bool, True where ids[n, m] belongs to tail set s of position n. An id counts once per
            set, however often it occurs, and padding belongs to none. None means no tail sets (S = 0).
        bias_V: added before the softcap; finite.
        softcap: c in c * tanh(z / c), positive (Gemma 2, 2024, section 2); None for none.
        temperature: positive; divides the logits after the softcap.
        own_top_k: how many of the student's own most likely tokens to return, 0 to V.
        averaged_FV: fixed vectors, finite; each one's average under the student is in `fixed`.
        weighing_GV: the same, and the student's logits weighed by each.
        chunk_tokens: positions per tile; changes speed and memory, not results.
        tile_vocab: vocabulary entries per tile; changes speed and memory, not results.
        fused: read each tile once, in a kernel of Triton's, and not in several of torch's; None does so on a
            GPU where Triton is installed. Not for float64, nor with vectors, which torch's operations sum.

    Raises:
        ValueError: shapes or dtypes do not fit, a number is out of range, or an id lies outside the
            vocabulary (the message names its position). A GPU would have to be waited for to know: there
            the log-probability of such an id is minus infinity.
    """
    if member_NSM is None:
        member_NSM = ids_NM.new_zeros((*ids_NM.shape[:1], 0, *ids_NM.shape[1:]), dtype=torch.bool)
    _check_shapes(hidden_ND, head_VD, ids_NM, member_NSM, bias_V)
    _check_ids(ids_NM, num_vocab=head_VD.shape[0])
    _check_range("own_top_k", own_top_k, 0, head_VD.shape[0])
    inputs = Inputs(hidden_ND, head_VD, bias_V)
    walk = plan_walk(inputs, softcap, temperature, chunk_tokens, tile_vocab, fused)
    vectors = vectors_for(averaged_FV, weighing_GV, len(head_VD), hidden_ND, walk.dtype)
    walk = walk._replace(is_fused=walk.is_fused and vectors is None)
    given = (*inputs, walk, _distinct(ids_NM, member_NSM), own_top_k, vectors)
    outputs = cast(tuple[Tensor, ...], _SelectedLogprobs.apply(*given))  # type: ignore[no-untyped-call]
    logprobs_NM, tail_NS, logsumexp_N, entropy_N, *own = outputs[:6]
    top_ids_NK, top_NK = own if own_top_k else (None, None)
    fixed = vectors and FixedSums(*outputs[6:])
    return TokenLogprobs(logprobs_NM, tail_NS, logsumexp_N, entropy_N, top_ids_NK, top_NK, fixed)


class _Requested(NamedTuple):
    """The distinct ids at each position, and how they answer for the ids requested."""

    ids_NU: Tensor
    is_member_NSU: Tensor
    slot_NM: Tensor
    is_padding_NM: Tensor


class _Shares(NamedTuple):
    """Logits and logarithms of sums, all relative to the largest logit at their position.

    A difference of two of them is as exact as float32 allows, however large the logits are.
    """

    others_max_N: Tensor
    requested_NU: Tensor
    log_total_N: Tensor
    log_outside_NS: Tensor


class _SelectedLogprobs(torch.autograd.Function):
    """Joins the two passes: closed forms on [N, U] between them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        walk: Walk,
        requested: _Requested,
        own_top_k: int,
        vectors: Vectors | None,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(hidden_ND, weight_VD, bias_V)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums = vocabulary_sums(inputs, requested.ids_NU, walk, own_top_k, vectors)
        peak_N = torch.cat([sums.max_N[:, None], sums.requested_NU], dim=1).amax(1)
        shares = _shares(sums, peak_N, requested.is_member_NSU)
        logprobs_NU = shares.requested_NU - shares.log_total_N[:, None]
        logprobs_NM = logprobs_NU.gather(1, requested.slot_NM).masked_fill_(requested.is_padding_NM, 0.0)
        tail_NS = shares.log_outside_NS - shares.log_total_N[:, None]
        logsumexp_N = peak_N + shares.log_total_N
        entropy_N = _entropy(sums, shares)
        top_NK = sums.top_logits_NK - peak_N[:, None] - shares.log_total_N[:, None]
        fixed = fixed_sums(sums, _slots(requested, shares), vectors, entropy_N) if vectors else ()
        ctx.walk = walk
        ctx.save_for_backward(*inputs, *requested, sums.max_N, *shares, *(vectors or ()), *fixed)
        # With no vector to average, the second walk has no term of the entropy's.
        detached = fixed[:1] if vectors and not len(vectors.averaged_FV) else ()
        ctx.mark_non_differentiable(entropy_N, sums.top_ids_NK, top_NK, *detached)
        return logprobs_NM, tail_NS, logsumexp_N, entropy_N, sums.top_ids_NK, top_NK, *fixed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_NM: Tensor, grad_tail_NS: Tensor, grad_logsumexp_N: Tensor, *rest: Tensor
    ) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, requested, max_N, shares = (
            Inputs(*saved[:3]),
            _Requested(*saved[3:7]),
            saved[7],
            _Shares(*saved[8:12]),
        )
        vectors = Vectors(*saved[12:14]) if saved[12:] else None
        with torch.autocast(max_N.device.type, enabled=False):
            given = (grad_logprobs_NM, grad_tail_NS, grad_logsumexp_N)
            gradient = _logit_gradient(*given, requested, max_N, shares)
            if vectors is not None:
                sums, slots = (FixedSums(*rest[3:]), FixedSums(*saved[14:])), _slots(requested, shares)
                by_vectors = add_gradient(*sums, slots, vectors, gradient.scale_N, gradient.requested_NU)
                gradient = gradient._replace(by_vectors=by_vectors)
            wanted = ctx.needs_input_grad[:3]
            gradients = propagate(inputs, requested.ids_NU, ctx.walk, gradient, wanted, vectors)
        return (*gradients, None, None, None, None)


def _slots(requested: _Requested, shares: _Shares) -> Slots:
    logprobs_NU = shares.requested_NU - shares.log_total_N[:, None]
    return Slots(requested.ids_NU, logprobs_NU, shares.others_max_N - shares.log_total_N)


def _distinct(ids_NM: Tensor, member_NSM: Tensor) -> _Requested:
    """Give equal ids of a row one slot; the slot is in a set when any of its ids is."""
    num_positions, num_requested = ids_NM.shape
    is_padding_NM = ids_NM == PADDING_ID
    sorted_NM, order_NM = ids_NM.sort(dim=1)
    is_new_NM = torch.ones_like(is_padding_NM)
    is_new_NM[:, 1:] = sorted_NM[:, 1:] != sorted_NM[:, :-1]
    slot_NM = torch.empty_like(ids_NM).scatter_(1, order_NM, is_new_NM.cumsum(1) - 1)
    ids_NU = torch.full_like(ids_NM, PADDING_ID).scatter_(1, slot_NM, ids_NM)
    # Ids that are not members are sent to one more slot, which is then dropped.
    target_NSM = torch.where(member_NSM, slot_NM[:, None], num_requested)
    is_member = member_NSM.new_zeros((num_positions, member_NSM.shape[1], num_requested + 1))
    return _Requested(
        ids_NU, is_member.scatter_(2, target_NSM, True)[:, :, :num_requested], slot_NM, is_padding_NM
    )


def _shares(sums: VocabularySums, peak_N: Tensor, is_member_NSU: Tensor) -> _Shares:
    others_max_N = sums.max_N - peak_N
    others_N = others_max_N + sums.sum_N.log()
    requested_NU = sums.requested_NU - peak_N[:, None]
    outside_NSU = requested_NU[:, None].masked_fill(is_member_NSU, -torch.inf)
    others_NS1 = others_N[:, None, None].expand(-1, is_member_NSU.shape[1], 1)
    return _Shares(
        others_max_N=others_max_N,
        requested_NU=requested_NU,
        log_total_N=torch.cat([others_N[:, None], requested_NU], dim=1).logsumexp(1),
        log_outside_NS=torch.cat([others_NS1, outside_NSU], dim=2).logsumexp(2),
    )


def _entropy(sums: VocabularySums, shares: _Shares) -> Tensor:
    """Minus the mean of log p: others from their running sums, requested tokens one by one."""
    top_logprob_N = shares.others_max_N - shares.log_total_N
    others_N = top_logprob_N.exp() * (sums.moment_N + top_logprob_N * sums.sum_N)
    logprobs_NU = shares.requested_NU - shares.log_total_N[:, None]
    requested_N = (logprobs_NU.exp() * logprobs_NU.clamp(min=FLOOR)).sum(1)
    return -(others_N + requested_N)


def _logit_gradient(
    grad_logprobs_NM: Tensor,
    grad_tail_NS: Tensor,
    grad_logsumexp_N: Tensor,
    requested: _Requested,
    max_N: Tensor,
    shares: _Shares,
) -> LogitGradient:
    """Backward of the closed forms.

    With g, t and n the gradients by log-probabilities, tails and normaliser, and G the sum of g and t less n:
    g_v - G p_v, plus t_s * p_v / tail_s for every set s that v is outside of.
    """
    grad_NM = grad_logprobs_NM.masked_fill(requested.is_padding_NM, 0.0)
    has_tail_NS = shares.log_outside_NS > -torch.inf
    tail_NS = torch.where(has_tail_NS, grad_tail_NS, 0.0)
    outside_NS = torch.where(has_tail_NS, shares.log_outside_NS, 0.0)
    total_N = grad_NM.sum(1) + tail_NS.sum(1) - grad_logsumexp_N
    scale_N = (tail_NS * (shares.others_max_N[:, None] - outside_NS).exp()).sum(1)
    scale_N -= total_N * (shares.others_max_N - shares.log_total_N).exp()
    share_NSU = (shares.requested_NU[:, None] - outside_NS[:, :, None]).masked_fill(
        requested.is_member_NSU, -torch.inf
    )
    requested_NU = (tail_NS[:, :, None] * share_NSU.exp()).sum(1)
    requested_NU -= total_N[:, None] * (shares.requested_NU - shares.log_total_N[:, None]).exp()
    return LogitGradient(max_N, scale_N, requested_NU.scatter_add_(1, requested.slot_NM, grad_NM))


def plan_walk(
    inputs: Inputs,
    softcap: float | None,
    temperature: float,
    chunk_tokens: int | None,
    tile_vocab: int | None,
    fused: bool | None,
) -> Walk:
    """Form of the logits, and the sizes of the pieces for this device.

    Raises:
        ValueError: a number is out of range.
    """
    is_cuda = inputs.hidden_ND.is_cuda
    default_chunk, default_tile = CUDA_TILE if is_cuda else CPU_TILE
    if is_cuda and len(inputs.hidden_ND) <= FEW_POSITIONS:
        default_chunk //= 2
    dtypes = {tensor.dtype for tensor in inputs if tensor is not None}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    walk = Walk(
        softcap=softcap,
        temperature=temperature,
        chunk_tokens=default_chunk if chunk_tokens is None else chunk_tokens,
        tile_vocab=default_tile if tile_vocab is None else tile_vocab,
        dtype=dtype,
        operand_dtype=torch.bfloat16 if is_cuda and dtypes == {torch.bfloat16} else dtype,
        is_fused=dtype == torch.float32 and (is_cuda and has_triton() if fused is None else fused),
    )
    _check_range("chunk_tokens", walk.chunk_tokens, 1)
    _check_range("tile_vocab", walk.tile_vocab, 1)
    for name, value in (("softcap", softcap), ("temperature", temperature)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, found {value}")
    return walk


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; torch for CUDA brings it on Linux."""
    return importlib.util.find_spec("triton") is not None


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} must be {limits}, found {value}")


def _check_shapes(
    hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor, member_NSM: Tensor, bias_V: Tensor | None
) -> None:
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)} and head {tuple(head_VD.shape)} must be [N, D] and [V, D]"
        )
    if head_VD.shape[0] == 0:
        raise ValueError("the head has no vocabulary entries")
    if ids_NM.ndim != 2 or ids_NM.shape[0] != hidden_ND.shape[0] or ids_NM.dtype != torch.int64:
        raise ValueError(
            f"ids must be int64 [N, M] with N = {hidden_ND.shape[0]}, found "
            f"{ids_NM.dtype} {tuple(ids_NM.shape)}"
        )
    num_positions, num_requested = ids_NM.shape
    is_fitting = member_NSM.ndim == 3 and member_NSM.shape[::2] == (num_positions, num_requested)
    if not is_fitting or member_NSM.dtype != torch.bool:
        raise ValueError(
            f"member must be bool [N, S, M] with N = {num_positions} and M = {num_requested}, found "
            f"{member_NSM.dtype} {tuple(member_NSM.shape)}"
        )
    if bias_V is not None and bias_V.shape != head_VD.shape[:1]:
        raise ValueError(f"bias {tuple(bias_V.shape)} must be [V] with V = {head_VD.shape[0]}")


def _check_ids(ids_NM: Tensor, num_vocab: int) -> None:
    """One comparison per call; the position is only looked for when there is something to report."""
    if ids_NM.numel() == 0 or ids_NM.device.type != "cpu":
        return
    is_wrong_NM = (ids_NM < PADDING_ID) | (ids_NM >= num_vocab)
    if is_wrong_NM.any():
        position, column = (int(index) for index in is_wrong_NM.nonzero()[0])
        raise ValueError(
            f"ids[{position}, {column}] is {int(ids_NM[position, column])}, outside the vocabulary of "
            f"{num_vocab} (only {PADDING_ID} is padding); were these ids made with another tokenizer?"
        )
