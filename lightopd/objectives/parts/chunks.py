"""Chunks of rollouts that a teacher continued: their likelihood, and what lies outside them (2606.01476).

R = rollouts, N = their response tokens laid end to end, M = chunks of a rollout; nats.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightopd.cache.reader import ShardColumns
from lightopd.objectives.base.part import Needs, Scene
from lightopd.objectives.base.rollout_table import Floats, Measure, RolloutTable
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.targets import ChunkAuditTarget
from lightopd.schemas.objectives.weights import OutsideChunksWeight

Config = ChunkAuditTarget | OutsideChunksWeight


def chunk_audit(config: ChunkAuditTarget, scene: Scene) -> Tensor:
    """-sg[p] log s inside a chunk, 0 outside, [N]; p = (sum of similarities + alpha q) / (number + alpha).

    q = exp(mean log s) over the trained tokens of the chunk: the student now, without gradient.
    """
    batch, logprobs_N = scene.batch, scene.student.logprobs_N
    is_inside_NM = _is_inside(config, scene)
    is_counted_NM = is_inside_NM & batch.loss_mask_N[:, None]
    empty_RM = logprobs_N.new_zeros(len(batch.lengths_R), is_inside_NM.shape[1])
    values_NM = torch.where(is_counted_NM, logprobs_N.detach()[:, None], 0.0)
    sum_RM = empty_RM.index_add(0, batch.row_N, values_NM)
    count_RM = empty_RM.index_add(0, batch.row_N, is_counted_NM.to(empty_RM.dtype))
    confidence_RM = (sum_RM / count_RM.clamp(min=1)).exp()
    similarity_RM, number_RM = batch.prepared_R[f"{scene.term.name}/{config.kind}"][..., 2:].unbind(-1)
    target_RM = (similarity_RM + config.alpha * confidence_RM) / (number_RM + config.alpha)
    target_N = torch.where(is_inside_NM, target_RM[batch.row_N], 0.0).sum(1)
    return -target_N.to(logprobs_N.dtype) * logprobs_N


def outside_chunks(config: OutsideChunksWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """0 inside a chunk, 1 elsewhere, [N]."""
    return (~_is_inside(config, scene).any(1)).to(scene.student.logprobs_N.dtype)


def _is_inside(config: Config, scene: Scene) -> Tensor:
    """Whether a token lies in each chunk of its rollout, bool [N, M]; chunks that are not there are NaN."""
    chunks_NM4 = scene.prepared_N(config.kind)
    index_N1 = scene.batch.index_N[:, None]
    return (index_N1 >= chunks_NM4[..., 0]) & (index_N1 < chunks_NM4[..., 1])


def needs_chunks(config: Config, term: TermConfig) -> Needs:
    """The text column with the branches."""
    return Needs(chunks=(config.text,), prepared=True)


def chunk_measures(config: Config, term: TermConfig) -> dict[str, Measure]:
    """Chunks and their scores."""

    def measure(view: ShardColumns) -> Floats:
        return np.asarray(view.chunks_RM4[config.text], np.float64)

    return {f"chunks {config.text}": measure}


def chunk_column(config: Config, term: TermConfig, table: RolloutTable, is_seen_R: Any) -> Floats:
    """As measured, [R, M, 4]."""
    return table.measures[f"chunks {config.text}"]
