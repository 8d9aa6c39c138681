"""A micro-batch of one rollout, every token trained on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch


def one_rollout(ids_N: Tensor, signals: Mapping[str, SignalBatch]) -> RolloutBatch:
    """The response `ids_N`, of one turn and without reward, with its signals."""
    num_tokens, zeros_N = len(ids_N), torch.zeros_like(ids_N)
    return RolloutBatch(
        ids_N=ids_N,
        row_N=zeros_N,
        index_N=torch.arange(num_tokens),
        loss_mask_N=torch.ones(num_tokens, dtype=torch.bool),
        turns_N=zeros_N,
        ref_logprobs_N=None,
        signals=dict(signals),
        lengths_R=torch.tensor([num_tokens]),
        rewards_R=torch.zeros(1),
        is_truncated_R=torch.zeros(1, dtype=torch.bool),
        groups_R=torch.zeros(1, dtype=torch.int64),
        domains=(None,),
        rollout_ids=("r",),
        totals=BatchTotals(1, num_tokens),
        longest=num_tokens,
        num_turns=1,
    )
