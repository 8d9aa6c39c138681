"""Scores on ids of the caller's choice beside the most likely ones, full-vocabulary softmax in float32.

N = positions, C = positions in one slice, S = support ids, K = top-k, M = S + K, V = vocabulary; nats.
"""

import numpy as np
import torch
from torch import Tensor

from lightopd.engines.head_scores import PositionScores, gathered, logit_slices
from lightopd.engines.models import Head
from lightopd.schemas.records import Support

PADDING = -1


def support_ids(supports: list[Support], device: torch.device) -> Tensor:
    """Support of positions laid end to end, int64 [N, S], padded with -1."""
    counts_N = np.concatenate([support.counts for support in supports])
    padded_NS = np.full((len(counts_N), int(counts_N.max(initial=0))), PADDING, dtype=np.int64)
    padded_NS[np.arange(padded_NS.shape[1]) < counts_N[:, None]] = np.concatenate([s.ids for s in supports])
    return torch.from_numpy(padded_NS).to(device)


def score_support(
    head: Head, hidden_ND: Tensor, ids_N: Tensor, support_NS: Tensor, top_k: int
) -> PositionScores:
    """Scores whose entries are the support's ids and the `top_k` most likely ones, most likely first.

    Args:
        head: the model's output layer.
        hidden_ND: what it reads, any float dtype.
        ids_N: int64, the token at each position.
        support_NS: int64, ids that are kept whatever their probability; -1 is padding.
        top_k: 0 to V.
    """
    return gathered(
        [
            _score_slice(logits_CV, ids_N[rows], support_NS[rows], top_k)
            for rows, logits_CV in logit_slices(head, hidden_ND)
        ]
    )


def _score_slice(logits_CV: Tensor, ids_C: Tensor, support_CS: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Fields of `PositionScores`; the tail is a sum over the tokens that are not kept, never 1 - sum."""
    logprobs_CV = logits_CV.log_softmax(1)
    width = logits_CV.shape[1]
    is_kept_CV = torch.zeros((len(logits_CV), width + 1), dtype=torch.bool, device=logits_CV.device)
    is_kept_CV.scatter_(1, torch.where(support_CS < 0, width, support_CS), True)
    is_kept_CV.scatter_(1, logprobs_CV.topk(top_k).indices, True)
    is_kept_CV = is_kept_CV[:, :width]
    counts_C = is_kept_CV.sum(1)
    tail_C = logprobs_CV.masked_fill(is_kept_CV, -torch.inf).logsumexp(1).clamp(max=0)
    most = min(width, support_CS.shape[1] + top_k)
    kept_CM, ids_CM = logprobs_CV.masked_fill(~is_kept_CV, -torch.inf).topk(most)
    return logprobs_CV.gather(1, ids_C[:, None])[:, 0], counts_C, ids_CM, kept_CM, tail_C
