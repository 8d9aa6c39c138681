"""How far the student is from what it is trained towards, on rollouts that it never trains on."""

# B = rollouts held out

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.objectives.base.batch import BatchTotals
from lightopd.objectives.base.hidden_states import HiddenSignal
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.teacher import teacher_names
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import term_needs
from lightopd.objectives.state import ObjectiveState, visible_tokens
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig
from lightopd.schemas.objectives.targets import ConstantExtrapolation, DivergenceTarget, EstimatorTarget
from lightopd.training.data.batches import HostBatch, collate, collect_rows, response_index, show
from lightopd.training.data.plan import CacheIndex, pack
from lightopd.training.data.shard_store import ShardStore
from lightopd.training.student.forward import student_sums, student_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rollouts that are held out, and what is measured on them."""

    index: CacheIndex
    store: ShardStore
    objective: ObjectiveConfig
    needed: Needs
    """What the objective reads of the cache."""
    micro_batch_tokens: int
    row_tokens: int | None = None
    """Length of the rows that rollouts share; None where each has its own."""

    def rows(self, rank: int, world_size: int) -> list[HostBatch]:
        """This rank's share, read once and kept on the host."""
        return self._gathered(self._packed()[rank::world_size])

    def idle_rows(self, rank: int, world_size: int) -> list[HostBatch]:
        """What this rank runs without counting it, where every rank has to run as many micro-batches."""
        packed = self._packed()
        return self._gathered(packed[:1] if rank >= (len(packed) % world_size or world_size) else [])

    def _packed(self) -> list[NDArray[np.int64]]:
        lengths_P, size = self.index.lengths_P, self.index.group_size
        return pack(lengths_P, self.micro_batch_tokens, 1, size, self.row_tokens)[0]

    def _gathered(self, micro_batches: Sequence[NDArray[np.int64]]) -> list[HostBatch]:
        totals = BatchTotals(len(self.index.lengths_P), int(self.index.trained_P.sum()))
        return [
            collect_rows(self.store, self.index, entries, totals, self.row_tokens)
            for entries in micro_batches
        ]


def held_out_objective(objective: ObjectiveConfig, needed: Needs) -> ObjectiveConfig:
    """What is measured on held-out rollouts; lower is better, and it is never negative.

    An objective that reads a teacher is measured by the divergence of its first teacher: the reverse KL where
    the student is evaluated on the teacher's support, or over the whole vocabulary where the objective
    compares it so; else half the squared log-ratio of the sampled tokens (k2), which is zero where the two
    agree. Any other objective is measured by its own loss.
    """
    for term in objective.terms:
        names = set(teacher_names(term))
        if names <= set(term_needs(term).signals):
            target: DivergenceTarget | EstimatorTarget = EstimatorTarget(kind="estimator", estimator="k2")
            if names <= set(needed.supports):
                target = DivergenceTarget(kind="divergence", divergence="reverse_kl")
            elif isinstance(term.target, DivergenceTarget) and term.target.tail == "whole":
                target = DivergenceTarget(kind="divergence", divergence="reverse_kl", tail="whole")
            measured = TermConfig(
                signal=term.signal,
                router=term.router,
                extrapolate=_unguarded(term),
                target=target,
                entries=term.entries,
            )
            return ObjectiveConfig(terms=(measured,))
    return objective.model_copy(update={"select": (), "curriculum": None, "balance": None, "jump": None})


def held_out_loss(
    student: PreTrainedModel,
    micro_batches: Sequence[HostBatch],
    held_out: HeldOut,
    hidden: Sequence[HiddenSignal],
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
) -> float:
    """The loss over all held-out rollouts, nats for a divergence.

    Args:
        student: in its own number format.
        micro_batches: this rank's share of the rollouts held out.
        held_out: what is measured.
        hidden: signals whose hidden states it reads.
        device: of the student.
        reduce: adds up over the ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    objective, supports = held_out.objective, held_out.needed.supports
    with torch.no_grad():
        for rows in micro_batches:
            batch = collate(rows, device)
            tokens = student_tokens(student, batch, supports, hidden=hidden)
            loss = compute_loss(objective, batch.rollouts, tokens)
            total += loss.value.double()
    return float(reduce(total))


def held_out_entropy(
    student: PreTrainedModel,
    micro_batches: Sequence[HostBatch],
    objective: ObjectiveConfig,
    state: ObjectiveState,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
) -> float:
    """Mean entropy of the student now, nats, over what a curriculum shows of the held-out rollouts.

    Args:
        student: in its own number format.
        micro_batches: this rank's share of the rollouts held out.
        objective: with the curriculum.
        state: where the curriculum stands.
        device: of the student.
        reduce: adds up over the ranks.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.no_grad():
        for rows in micro_batches:
            turns_N = rows.turns_N.astype(np.int64)
            shown = show(rows, visible_tokens(objective, state, response_index(rows), turns_N))
            batch = collate(shown, device)
            tokens = student_tokens(student, batch, ())
            sums += torch.stack(student_sums(batch.rollouts, tokens)["entropy"])
    total, weight = reduce(sums).tolist()
    log.info("step %d: entropy %.6g nats on the rollouts held out", state.steps + 1, total / weight)
    return float(total / weight)


def _unguarded(term: TermConfig) -> object:
    if isinstance(term.extrapolate, ConstantExtrapolation):
        return term.extrapolate.model_copy(update={"guard": None})
    return term.extrapolate
