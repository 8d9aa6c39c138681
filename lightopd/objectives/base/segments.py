"""Sums and ranks within rollouts whose tokens lie end to end.

R = rollouts, N = tokens, L = longest response.
"""

import torch
from torch import Tensor

from lightopd.objectives.base.batch import RolloutBatch


def rollout_sums(values_N: Tensor, batch: RolloutBatch) -> Tensor:
    """Sum of `values_N` over the trained tokens of each rollout, [R]."""
    kept_N = torch.where(batch.loss_mask_N, values_N, torch.zeros_like(values_N))
    return kept_N.new_zeros(len(batch.lengths_R)).index_add(0, batch.row_N, kept_N)


def token_mean(values_N: Tensor, loss_mask_N: Tensor) -> tuple[Tensor, Tensor]:
    """A metric as (sum, weight): detached sum over the counted tokens, and their number, float32."""
    kept_N = torch.where(loss_mask_N, values_N.detach(), torch.zeros_like(values_N))
    return kept_N.sum().float(), loss_mask_N.sum().float()


def pad_rollouts(values_N: Tensor, batch: RolloutBatch, fill: float) -> Tensor:
    """[R, L] with one rollout a row, `fill` where there is no token."""
    padded_RL = values_N.new_full((len(batch.lengths_R), batch.longest), fill)
    padded_RL[batch.row_N, batch.index_N] = values_N
    return padded_RL


def flatten_rollouts(padded_RL: Tensor, batch: RolloutBatch) -> Tensor:
    """[N], the inverse of `pad_rollouts`."""
    return padded_RL[batch.row_N, batch.index_N]
