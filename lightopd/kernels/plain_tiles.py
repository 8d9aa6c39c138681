"""What is done with one tile of logits, by torch's operations: the path of a CPU, and the reference."""

# C = positions in one chunk, T = tokens in one tile, K = own top-k
# U = slots for the distinct ids requested at a position
# F = vectors averaged by the student, G = vectors that average its logits

import torch
from torch import Tensor

from lightopd.kernels.tile_types import SUNK, LogitGradient, VectorGradient, Vectors, VocabularySums, Walk


def finish_logits(logits_CT: Tensor, bias_T: Tensor | None, walk: Walk) -> None:
    """Turn products into logits, in place: bias, then softcap, then temperature."""
    if bias_T is not None:
        logits_CT.add_(bias_T)
    if walk.softcap is not None:
        logits_CT.div_(walk.softcap).tanh_().mul_(walk.softcap)
    if walk.temperature != 1.0:
        logits_CT.div_(walk.temperature)


def absorb(
    part: VocabularySums,
    logits_CT: Tensor,
    ids_CU: Tensor,
    start: int,
    exp_buffer: Tensor,
    vectors: Vectors | None = None,
) -> None:
    """Add a tile that begins at token `start` to the running sums of its rows; the tile is spent afterwards.

    Args:
        part: the chunk's rows, changed in place.
        logits_CT: finished logits.
        ids_CU: int64, distinct within a row, -1 in slots without a token.
        start: first token of the tile.
        exp_buffer: room for as many numbers as the tile has.
        vectors: their entries at the tokens of the tile.
    """
    if vectors is not None:  # before requested tokens are sunk: these sums are over all
        part.weighed_NG.addmm_(logits_CT, vectors.weighing_GV.t())
    column_CU, is_inside_CU = _locate(ids_CU, start, logits_CT.shape[1])
    torch.where(is_inside_CU, logits_CT.gather(1, column_CU), part.requested_NU, out=part.requested_NU)
    _sink(logits_CT, column_CU, is_inside_CU)
    max_C = torch.maximum(part.max_N, logits_CT.amax(1))
    logits_CT.sub_(max_C[:, None])
    exp_CT = torch.exp(logits_CT, out=exp_buffer[: logits_CT.numel()].view(logits_CT.shape))
    shift_C = part.max_N - max_C
    scale_C = shift_C.exp()
    part.moment_N.addcmul_(part.sum_N, shift_C).mul_(scale_C).add_(torch.linalg.vecdot(exp_CT, logits_CT))
    part.sum_N.mul_(scale_C).add_(exp_CT.sum(1))
    if vectors is not None:
        part.averages_NF.mul_(scale_C[:, None]).addmm_(exp_CT, vectors.averaged_FV.t())
    part.max_N.copy_(max_C)


def merge_top_k(part: VocabularySums, logits_CT: Tensor, start: int) -> None:
    """Keep the largest of a tile's finished logits and of those found before."""
    own_top_k = part.top_logits_NK.shape[1]
    logits_CK, column_CK = logits_CT.topk(min(own_top_k, logits_CT.shape[1]))
    candidates = torch.cat([part.top_logits_NK, logits_CK], dim=1)
    candidate_ids = torch.cat([part.top_ids_NK, column_CK + start], dim=1)
    best, place = candidates.topk(own_top_k)
    part.top_logits_NK.copy_(best)
    part.top_ids_NK.copy_(candidate_ids.gather(1, place))


def turn_into_gradient(
    logits_CT: Tensor,
    part: LogitGradient,
    ids_CU: Tensor,
    start: int,
    walk: Walk,
    vectors: Vectors | None = None,
) -> Tensor:
    """Overwrite finished logits with the loss gradient by hidden @ weight.T + bias; returns them."""
    column_CU, is_inside_CU = _locate(ids_CU, start, logits_CT.shape[1])
    slope_CT = None
    if walk.softcap is not None:
        slope_CT = 1 - (logits_CT * (walk.temperature / walk.softcap)).square_()
    _sink(logits_CT, column_CU, is_inside_CU)
    logits_CT.sub_(part.max_N[:, None])
    if vectors is None or part.by_vectors is None:
        logits_CT.exp_().mul_(part.scale_N[:, None])
    else:
        _exp_times_factor(logits_CT, part.scale_N, part.by_vectors, vectors)
    logits_CT.scatter_add_(1, column_CU, torch.where(is_inside_CU, part.requested_NU, 0.0))
    if slope_CT is not None:
        logits_CT.mul_(slope_CT)
    if walk.temperature != 1.0:
        logits_CT.div_(walk.temperature)
    return logits_CT


def _exp_times_factor(below_CT: Tensor, scale_C: Tensor, part: VectorGradient, vectors: Vectors) -> None:
    """exp(below) times what multiplies it, plus the vectors that weigh logits; in place of `below`."""
    if len(vectors.averaged_FV):
        factor_CT = torch.addmm(scale_C[:, None], part.averaged_NF, vectors.averaged_FV)
        factor_CT.addcmul_(below_CT, part.moment_N[:, None])
        below_CT.exp_().mul_(factor_CT)
    else:
        below_CT.exp_().mul_(scale_C[:, None])
    if len(vectors.weighing_GV):
        below_CT.addmm_(part.weighing_NG, vectors.weighing_GV)


def _locate(ids_CU: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each id within the tile, or some valid column with False where it lies elsewhere."""
    is_inside_CU = (ids_CU >= start) & (ids_CU < start + width)
    return (ids_CU - start).clamp_(0, width - 1), is_inside_CU


def _sink(logits_CT: Tensor, column_CU: Tensor, is_inside_CU: Tensor) -> None:
    """Take requested tokens out of the tile; ids of other tiles add 0 to whatever column they were given."""
    logits_CT.scatter_add_(1, column_CU, is_inside_CU.to(logits_CT.dtype) * SUNK)


def finish_with_slope(products_CT: Tensor, bias_T: Tensor | None, walk: Walk) -> Tensor | None:
    """`finish_logits`, and the slope of the softcap at each logit; None where there is no softcap."""
    finish_logits(products_CT, bias_T, walk)
    if walk.softcap is None:
        return None
    return 1 - (products_CT * (walk.temperature / walk.softcap)).square_()


def through_logits(grad_CT: Tensor, inner_CT: Tensor | None, walk: Walk) -> Tensor:
    """A gradient by the logits as one by the products, in place; `inner_CT` is of `finish_with_slope`."""
    if inner_CT is not None:
        grad_CT.mul_(inner_CT)
    return grad_CT if walk.temperature == 1.0 else grad_CT.div_(walk.temperature)
