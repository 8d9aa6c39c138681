"""The student as a LightningModule: one training step is one optimiser step over its micro-batches.

Optimisation is manual because a step's micro-batches share one normalisation: the loss of each is divided by
totals of the whole step, so gradients add up to those of one large batch, whatever its division. The model's
own head never runs; only response positions reach the output layer, through `selected_logprobs`.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightopd.errors import LightopdError, TrainingError
from lightopd.models.head import Head, head_of
from lightopd.objectives import state as states
from lightopd.objectives.base.batch import BatchTotals, MetricSums, StudentTokens
from lightopd.objectives.base.hidden_states import HiddenSignal, heads_on, hidden_signals
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.whole_vocabulary import SpreadTail
from lightopd.objectives.loss import collect_step_sums, compute_loss
from lightopd.objectives.state import ObjectiveState
from lightopd.schemas.finetune import FinetuneConfig, StalenessLimits
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.objectives.weights import LengthCurriculum
from lightopd.training.checkpoints.checkpoint import load_optimizer
from lightopd.training.data.batches import HostBatch, Microbatch, collate, count_totals, response_index, show
from lightopd.training.distributed.fsdp import count_broken, shard_student
from lightopd.training.distributed.strategies import FSDP
from lightopd.training.jumps import WeightJumps
from lightopd.training.measures.accuracy import AVG_AT_K, AccuracyMeter
from lightopd.training.measures.best import Best
from lightopd.training.measures.held_out import HeldOut, held_out_entropy, held_out_loss
from lightopd.training.measures.metrics_file import global_sums, metric_mean
from lightopd.training.messages import broken_weights, memory_named, named_everywhere, not_finite
from lightopd.training.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    narrow_moments,
    set_learning_rate,
)
from lightopd.training.privacy.gradients import PrivateGradients
from lightopd.training.student.compile import uncompiled
from lightopd.training.student.drift import DRIFT_SUMS, DriftWatch
from lightopd.training.student.ema import WeightAverage
from lightopd.training.student.forward import routed_tokens, routers_of, student_sums, student_tokens
from lightopd.training.student.router_loss import (
    ROUTER_LOSS,
    Routers,
    StepLoad,
    count_load,
    experts_per_token,
    step_load,
)
from lightopd.training.weight_files.tensor_shards import AVERAGE, JUMP_ANCHOR
from lightopd.under_way import each_told

log = logging.getLogger(__name__)

NOT_LOGGED = ("loss", "tokens", *DRIFT_SUMS)
"""Sums that are logged under another name, or not as means."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins or resumes."""

    step: int = 0
    """Optimiser steps already done."""
    checkpoint: Path | None = None
    """Folder whose optimiser state is loaded before the first step."""
    state: ObjectiveState = field(default_factory=ObjectiveState)
    """Of the objective."""
    best: Best | None = None
    """The best measurement so far."""
    num_exceeded: int = 0
    """Last steps in a row that passed a limit of staleness."""


class StudentModule(LightningModule):  # type: ignore[misc]
    """Trains a causal language model against cached rollouts.

    Args:
        student: in its own number format and in training mode, its dropout off (see `prepare_student`).
        objective: the loss.
        needed: what it needs of the cache; `tails` are its tails with their shapes, `heads` those of the
            signals whose hidden states it reads.
        finetune: optimiser, schedule and number of steps.
        limits: drift past which the cache counts as stale; None for never.
        held_out: rollouts that the student is measured on; None for none.
        accuracy: puts prompts to the student when it is due; None for never.
        start: where the run begins or resumes.
        privacy_key: of a private run's noise.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        objective: ObjectiveConfig,
        needed: Needs,
        finetune: FinetuneConfig,
        *,
        tails: Sequence[SpreadTail] = (),
        heads: Mapping[str, Head] = MappingProxyType({}),
        limits: StalenessLimits | None = None,
        held_out: HeldOut | None = None,
        accuracy: AccuracyMeter | None = None,
        start: Start = Start(),
        privacy_key: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student = student
        self.objective = objective
        self.needed, self.tails, self.heads = needed, tails, heads
        self.hidden: tuple[HiddenSignal, ...] = ()
        """What is made of hidden states in a step, with heads on the device; and on held-out rollouts."""
        self._held_out_hidden: tuple[HiddenSignal, ...] = ()
        self.finetune = finetune
        self.held_out = held_out
        self.accuracy = accuracy
        self.step = start.step
        self.state = start.state
        self.checkpoint = start.checkpoint
        self.privacy_key = privacy_key
        self.best = start.best
        self.average: WeightAverage | None = None
        self.jumps: WeightJumps | None = None
        self.private: PrivateGradients | None = None
        self.metrics: dict[str, float] = {}
        """Numbers of the last step, the same on every rank."""
        self.is_between_steps = False
        """Whether weights, moments and `metrics.csv` stand at the end of step `step`."""
        self._held_out_rows: list[HostBatch] = []
        self._idle_rows: list[HostBatch] = []
        self._step_began_s = 0.0
        self.drift = DriftWatch(limits, finetune.steps, start.num_exceeded)

    def configure_model(self) -> None:
        """Shard the student over the devices, where the strategy does."""
        if self.finetune.strategy == FSDP and not isinstance(self.student, FSDPModule):
            shard_student(self.student, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the student."""
        low_memory = self.finetune.precision == "bf16-true"
        return make_optimizer(self.student, self.finetune.optimizer, low_memory=low_memory)

    def on_train_start(self) -> None:
        """Load what a checkpoint has beside the weights, read what is held out, and start the clock."""
        if self.checkpoint is not None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            load_optimizer(self.checkpoint, self.student, optimizer)
            narrow_moments(optimizer)
        if self.finetune.ema_decay is not None:
            self.average = WeightAverage(self.student, self.finetune.ema_decay, self.checkpoint)
        if self.finetune.privacy is not None:
            size = self.finetune.batch_sequences
            self.private = PrivateGradients(self.finetune.privacy, self.student, size, self.privacy_key)
        is_half = self.device.type == "cuda" and self.finetune.precision != "32-true"
        heads = heads_on(self.heads, self.device, torch.bfloat16 if is_half else None)
        width = len(head_of(self.student).weight_VD)
        self.hidden = hidden_signals(self.needed, heads, width)
        if self.held_out is not None:
            self._held_out_hidden = hidden_signals(self.held_out.needed, heads, width)
            place = (self.global_rank, self.trainer.world_size)
            self._held_out_rows = self.held_out.rows(*place)
            if isinstance(self.student, FSDPModule):
                self._idle_rows = self.held_out.idle_rows(*place)
        if self.objective.jump is not None:
            self.jumps = WeightJumps(self.objective.jump, self.student, self.checkpoint)
        self._step_began_s = time.monotonic()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the step's rows on the host; each micro-batch moves when its turn comes."""
        return batch

    def training_step(self, micro_batches: list[HostBatch] | LightopdError, batch_idx: int) -> None:
        """One optimiser step.

        Raises:
            TrainingError: the loss or the gradient is not finite, or memory runs out; no weight has been
                changed by this step.
            CacheError: a shard could not be read.
        """
        if isinstance(micro_batches, LightopdError):
            raise micro_batches
        optimizer = self.optimizers()
        rate = learning_rate(self.finetune.optimizer, self.step, self.finetune.steps)
        set_learning_rate(optimizer, rate)
        shown = self._shown(micro_batches)
        step_sums, load = self._look_ahead(shown)
        sums, private = self._gradients(shown, step_sums, load)
        totals = global_sums(sums, self._reduce) if sums else {}  # a private step may draw nothing
        self._refuse_non_finite(totals.get("loss", (0.0, 0.0))[0], sums, shown)
        norm = float(clip_gradients(self.student, self.finetune.optimizer.clip_norm))
        if not norm < float("inf"):
            raise TrainingError(not_finite(f"gradient norm ({norm})", self.step, named_everywhere(shown)))
        self.is_between_steps = False
        with self._memory_named(None):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        means = {name: metric_mean(name, *pair) for name, pair in totals.items()}
        taught_by = states.exposure_metric(self.objective, self.state)
        self.state = states.advance(self.objective, self.state, {**means, **self._gate()})
        jumped = self.jumps.after_step(self.step, lambda: -self._held_out_loss()) if self.jumps else {}
        if self.average is not None:
            self.average.update()
        drift = self.drift.metrics(self.step, totals, is_speaking=self.trainer.is_global_zero)
        measured = self._measure(is_last=self.step == self.finetune.steps or self.drift.ends_run)
        others = {**drift, **jumped, **measured, **private, **taught_by, "grad_norm": norm, "lr": rate}
        self._publish(means, totals.get("tokens", (0.0, 0.0))[0], others)

    def _gradients(
        self, shown: list[HostBatch], step_sums: MetricSums, load: StepLoad | None
    ) -> tuple[list[MetricSums], dict[str, float]]:
        """Leave the step's gradients on the student; metrics as sums, and what is known of a private step."""
        told, last = each_told(shown, f"train: step {self.step + 1}, micro-batch"), len(shown) - 1
        sums = []
        for place, rows in enumerate(told):
            sums.append(self._backward(rows, step_sums, load, is_last=place == last))
            if self.private is not None:
                self.private.add_rollout()
        return sums, self.private.finish(self.step) if self.private is not None else {}

    def _shown(self, micro_batches: list[HostBatch]) -> list[HostBatch]:
        """What the curriculum shows of the step, with totals counted over all ranks."""
        if self.objective.curriculum is None:
            return micro_batches
        shown = [
            show(rows, states.visible_tokens(self.objective, self.state, response_index(rows), turns_N))
            for rows, turns_N in ((rows, rows.turns_N.astype(np.int64)) for rows in micro_batches)
        ]
        counts = torch.tensor(count_totals(shown), dtype=torch.int64, device=self.device)
        totals = BatchTotals(*(int(count) for count in self._reduce(counts)))
        return [replace(rows, totals=totals) for rows in shown]

    def _look_ahead(self, micro_batches: Sequence[HostBatch]) -> tuple[MetricSums, StepLoad | None]:
        """MetricSums over the whole step that the loss needs beforehand, from a pass without gradient."""
        has_routers = self.finetune.router_loss is not None
        if not self.needed.step_sums and not has_routers:
            return {}, None
        sums, counts = [], []
        with torch.no_grad(), uncompiled(self.student):
            for rows in micro_batches:
                with self._memory_named(rows):
                    batch = collate(rows, self.device)
                    routers: Routers = ()
                    if self.needed.step_sums:
                        student, routers = self._student_tokens(batch)
                        sums.append(collect_step_sums(self.objective, batch.rollouts, student, self.state))
                    if has_routers:
                        routers = routers or routers_of(self.student, batch)
                        counts.append(count_load(routers, batch.is_token_BT, experts_per_token(self.student)))
        found = global_sums(sums, self._reduce) if sums else {}
        step_sums = {
            name: (torch.tensor(total, device=self.device), torch.tensor(weight, device=self.device))
            for name, (total, weight) in found.items()
        }
        return step_sums, step_load(counts, self._reduce) if has_routers else None

    def _student_tokens(self, batch: Microbatch) -> tuple[StudentTokens, Routers]:
        """What the student says, and its routers' logits where the loss reads them."""
        read = (self.student, batch, self.needed.supports, self.tails, self.hidden)
        return routed_tokens(*read) if self.finetune.router_loss is not None else (student_tokens(*read), ())

    def _backward(
        self, rows: HostBatch, step_sums: MetricSums, load: StepLoad | None, *, is_last: bool
    ) -> MetricSums:
        """Gradients of one micro-batch, added to those of the step; returns its metrics as sums."""
        with self._memory_named(rows):
            batch = collate(rows, self.device)
            student, routers = self._student_tokens(batch)
            loss = compute_loss(self.objective, batch.rollouts, student, step_sums, self.state)
            value, routed = loss.value, {}
            if load is not None:
                assert self.finetune.router_loss is not None
                balance = load.loss(routers, batch.is_token_BT)
                value = value + self.finetune.router_loss * balance
                routed = {ROUTER_LOSS: (balance.detach(), torch.ones_like(balance))}
            with nullcontext() if is_last else self._without_sync():
                # DDP takes the mean over ranks, and the ranks' losses are shares of one sum.
                self.manual_backward(value * self.trainer.world_size)
        value = value.detach()
        one = value.new_ones(())
        return {
            **loss.metrics,
            **routed,
            **student_sums(batch.rollouts, student),
            "loss": (value, one),
            "tokens": (one * batch.num_tokens, one),
        }

    def kept_beside(self) -> dict[str, dict[str, Tensor]]:
        """Sets of tensors that a checkpoint keeps beside weights and moments, by name."""
        found = {AVERAGE: self.average.tensors} if self.average else {}
        return found | ({JUMP_ANCHOR: self.jumps.anchor} if self.jumps else {})

    def _measure(self, *, is_last: bool) -> dict[str, float]:
        """Held-out loss and avg@k when they are due, NaN between; nothing where neither is requested."""
        is_due: dict[str, bool] = {}
        if self.held_out is not None:
            is_due["held_out"] = is_last or self.step % self.finetune.held_out_every == 0
        if self.accuracy is not None:
            is_due[AVG_AT_K] = is_last or self.accuracy.is_due(self.step)
        measures = {"held_out": self._held_out_loss, AVG_AT_K: self._avg_at_k}
        with self.average.in_place() if self.average and any(is_due.values()) else nullcontext():
            return {name: measures[name]() if due else float("nan") for name, due in is_due.items()}

    def _held_out_loss(self) -> float:
        assert self.held_out is not None
        with self._on_held_out():
            measured = (self._held_out_rows, self.held_out, self._held_out_hidden)
            return held_out_loss(self.student, *measured, self.device, self._reduce)

    def _gate(self) -> dict[str, float]:
        """What the objective's choices read of rollouts held out: a ladder's entropy, an exposure's loss."""
        if states.reads_held_out(self.objective, self.state):
            return {"held_out": self._held_out_loss()}
        if self.held_out is None or not isinstance(self.objective.curriculum, LengthCurriculum):
            return {}
        if not states.reads_entropy(self.objective, self.state):
            return {"entropy": float("nan")}
        place = (self.objective, self.state, self.device, self._reduce)
        with self._on_held_out():
            return {"entropy": held_out_entropy(self.student, self._held_out_rows, *place)}

    @contextmanager
    def _on_held_out(self) -> Iterator[None]:
        largest = max(self._held_out_rows, key=lambda rows: len(rows.response_ids_N), default=None)
        with torch.no_grad(), uncompiled(self.student), self._memory_named(largest):
            for rows in self._idle_rows:
                student_tokens(self.student, collate(rows, self.device), ())
            yield

    def _avg_at_k(self) -> float:
        """Mean reward of the student's answers; its time is not the step's."""
        assert self.accuracy is not None
        began_s = time.monotonic()
        place = (self.global_rank, self.trainer.world_size)
        value = self.accuracy.measure(self.student, self.step, place, self._reduce)
        self._step_began_s += time.monotonic() - began_s
        return value

    def _reduce(self, flat: Tensor) -> Tensor:
        """Sum over the ranks."""
        total: Tensor = self.trainer.strategy.reduce(flat, reduce_op="sum")
        return total

    def _memory_named(self, rows: HostBatch | None) -> AbstractContextManager[None]:
        return memory_named(self.student, self.finetune, rows)

    def _without_sync(self) -> AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return cast(AbstractContextManager[Any], block())

    def _refuse_non_finite(
        self, loss: float, sums: Sequence[MetricSums], micro_batches: Sequence[HostBatch]
    ) -> None:
        if loss - loss == 0:
            return
        values = torch.stack([one["loss"][0] for one in sums]).isfinite().tolist()
        bad = [rows for rows, is_finite in zip(micro_batches, values, strict=True) if not is_finite]
        raise TrainingError(not_finite(f"loss ({loss})", self.step, named_everywhere(bad or micro_batches)))

    def refuse_broken_weights(self) -> None:
        """Every rank must call.

        Raises:
            TrainingError: a trained weight is not finite.
        """
        if broken := int(self._reduce(count_broken(self.student))):
            raise TrainingError(broken_weights(self.step, broken))

    def _publish(self, means: Mapping[str, float], tokens: float, others: Mapping[str, float]) -> None:
        """Make the step's metrics."""
        now = time.monotonic()
        seconds, self._step_began_s = now - self._step_began_s, now
        self.metrics = {
            "step": self.step,
            "loss": means.get("loss", float("nan")),
            **{name: mean for name, mean in means.items() if name not in NOT_LOGGED},
            **others,
            "tokens": int(tokens),
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }
