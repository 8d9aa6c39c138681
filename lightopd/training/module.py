"""The student as a LightningModule: one training step is one optimiser step over its micro-batches.

Optimisation is manual because a step's micro-batches share one normalisation: the loss of each is divided by
totals of the whole step, so gradients add up to those of one large batch, whatever its division. The model's
own head never runs; only response positions reach the output layer, through `selected_logprobs`.
"""

# B = rollouts in a micro-batch, T = their padded length, N = their response tokens, D = hidden size
# K = widest support of a signal, M = ids asked per position, S = supports

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.engines.models import Head, head_of, last_hidden
from lightopd.errors import LightopdError, TrainingError
from lightopd.kernels.selected_logprobs import selected_logprobs
from lightopd.objectives.batch import RolloutBatch, StudentTokens
from lightopd.objectives.compose import compute_loss
from lightopd.schemas.configs import FinetuneConfig, StalenessLimits
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.training.checkpoint import load_optimizer
from lightopd.training.data import Microbatch, Rows, collate
from lightopd.training.metrics import global_sums
from lightopd.training.optimizer import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from lightopd.training.staleness import Sums, drift_metrics, drift_sums, exceeded_limits

log = logging.getLogger(__name__)

STALE = "step %d: the cache is stale: %s; roll out again from the current student"
NOT_LOGGED = ("loss", "tokens", "w", "w_squared", "log_ratio_lost")
"""Sums that are logged under another name, or not as means."""
NAMED_ROLLOUTS = 8
"""Rollouts that an error names one by one."""


class StudentModule(LightningModule):  # type: ignore[misc]
    """Trains a causal language model against cached rollouts.

    Args:
        student: in float32 and in training mode, its dropout off (see `prepare_student`).
        objective: the loss.
        supports: signals on whose top-k the student is evaluated.
        finetune: optimiser, schedule and number of steps.
        limits: drift past which the cache counts as stale; None for never.
        step: optimiser steps already done.
        checkpoint: folder whose optimiser state is loaded before the first step.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        objective: ObjectiveConfig,
        supports: Sequence[str],
        finetune: FinetuneConfig,
        *,
        limits: StalenessLimits | None = None,
        step: int = 0,
        checkpoint: Path | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student = student
        self.objective = objective
        self.supports = tuple(supports)
        self.finetune = finetune
        self.limits = limits
        self.step = step
        self.checkpoint = checkpoint
        self.metrics: dict[str, float] = {}
        """Numbers of the last step, the same on every rank."""
        self._step_began_s = 0.0
        self._has_warned = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the student."""
        return make_optimizer(self.student, self.finetune.optimizer)

    def on_train_start(self) -> None:
        """Load the optimiser's state, where there is one, and start the clock."""
        if self.checkpoint is not None:
            load_optimizer(self.checkpoint, self.student, self.optimizers(use_pl_optimizer=False))
        self._step_began_s = time.monotonic()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the step's rows on the host; each micro-batch moves when its turn comes."""
        return batch

    def training_step(self, micro_batches: list[Rows] | LightopdError, batch_idx: int) -> None:
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
        last = len(micro_batches) - 1
        sums = [self._backward(rows, is_last=index == last) for index, rows in enumerate(micro_batches)]
        totals = global_sums(sums, lambda flat: self.trainer.strategy.reduce(flat, reduce_op="sum"))
        self._refuse_non_finite(totals["loss"][0], sums, micro_batches)
        norm = float(clip_gradients(self.student, self.finetune.optimizer.clip_norm))
        if not norm < float("inf"):
            raise TrainingError(_not_finite(f"gradient norm ({norm})", self.step, micro_batches))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._publish(totals, norm, rate)

    def _backward(self, rows: Rows, *, is_last: bool) -> Sums:
        """Gradients of one micro-batch, added to those of the step; returns its metrics as sums."""
        try:
            batch = collate(rows, self.device)
            student = student_tokens(self.student, batch, self.supports)
            loss = compute_loss(self.objective, batch.rollouts, student)
            with nullcontext() if is_last else self._without_sync():
                # DDP takes the mean over ranks, and the ranks' losses are shares of one sum.
                self.manual_backward(loss.value * self.trainer.world_size)
        except torch.OutOfMemoryError as error:
            raise TrainingError(_no_memory(rows, self.finetune)) from error
        value = loss.value.detach()
        one = value.new_ones(())
        return {
            **loss.metrics,
            **student_sums(batch.rollouts, student),
            "loss": (value, one),
            "tokens": (one * batch.num_tokens, one),
        }

    def _without_sync(self) -> AbstractContextManager[Any]:
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        context: AbstractContextManager[Any] = block()
        return context

    def _refuse_non_finite(self, loss: float, sums: Sequence[Sums], micro_batches: Sequence[Rows]) -> None:
        if loss - loss == 0:
            return
        values = torch.stack([one["loss"][0] for one in sums]).isfinite().tolist()
        bad = [rows for rows, is_finite in zip(micro_batches, values, strict=True) if not is_finite]
        raise TrainingError(_not_finite(f"loss ({loss})", self.step, bad))

    def _publish(self, totals: dict[str, tuple[float, float]], norm: float, rate: float) -> None:
        """Make the step's metrics and hand them to Lightning's loggers."""
        now = time.monotonic()
        seconds, self._step_began_s = now - self._step_began_s, now
        means = {name: _mean(name, *pair) for name, pair in totals.items()}
        tokens = totals["tokens"][0]
        self.metrics = {
            "step": self.step,
            "loss": means["loss"],
            **{name: mean for name, mean in means.items() if name not in NOT_LOGGED},
            **self._drift(means),
            "grad_norm": norm,
            "lr": rate,
            "tokens": int(tokens),
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
        }
        for logger in self.trainer.loggers:
            logger.log_metrics(self.metrics, step=self.step)

    def _drift(self, means: dict[str, float]) -> dict[str, float]:
        """The step's drift, and whether it passes the limits; says so the first time."""
        if "w" not in means:
            return {}
        drift = drift_metrics(means)
        passed = exceeded_limits(drift, self.limits) if self.limits else []
        if passed and not self._has_warned and self.trainer.is_global_zero:
            log.warning(STALE, self.step, ", ".join(passed))
            self._has_warned = True
        return {**drift, "stale": int(bool(passed))}


def prepare_student(student: PreTrainedModel, *, gradient_checkpointing: bool) -> PreTrainedModel:
    """Put a loaded student into the state it is trained in.

    Dropout is switched off: w and the advantage compare this student with log-probabilities that were
    measured without it.
    """
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    if gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def student_tokens(student: PreTrainedModel, batch: Microbatch, supports: Sequence[str]) -> StudentTokens:
    """What the student says now about every response token, with gradients."""
    # Rows are padded on the right and attention is causal: no response position can see padding, so no
    # mask is needed, and without one the fastest attention kernels apply.
    hidden_BTD = last_hidden(student, input_ids=batch.input_ids_BT, use_cache=False)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.positions_N)
    return evaluate_tokens(hidden_ND, head_of(student), batch.rollouts, supports)


def evaluate_tokens(
    hidden_ND: Tensor, head: Head, rollouts: RolloutBatch, supports: Sequence[str]
) -> StudentTokens:
    """Log-probabilities of sampled tokens and of the supports' tokens, and the mass outside each support.

    Args:
        hidden_ND: last hidden state before each response token, any float dtype.
        head: the student's output layer.
        rollouts: the cached side.
        supports: names of the signals whose top-k is asked for.
    """
    blocks = [rollouts.ids_N[:, None], *(rollouts.signals[name].topk_ids_NK for name in supports)]
    widths = [block.shape[1] for block in blocks]
    ids_NM = torch.cat(blocks, dim=1)
    selected = selected_logprobs(
        hidden_ND,
        _like_hidden(head.weight_VD, hidden_ND),
        ids_NM,
        member_NSM=_members(ids_NM, widths),
        bias_V=head.bias_V,
        softcap=head.softcap,
        temperature=head.temperature,
    )
    sampled_N1, *on_supports = torch.split(selected.logprobs_NM, widths, dim=1)
    return StudentTokens(
        logprobs_N=sampled_N1.squeeze(1),
        entropies_N=selected.entropy_N,
        topk_logprobs_NK=dict(zip(supports, on_supports, strict=True)),
        tail_logprobs_N=dict(zip(supports, selected.tail_logprobs_NS.unbind(1), strict=True)),
    )


def student_sums(rollouts: RolloutBatch, student: StudentTokens) -> Sums:
    """The student's entropy and its drift from the one at rollout, as sums over the trained tokens."""
    mask_N = rollouts.is_trained_N.double()
    sums: Sums = {"entropy": ((student.entropies_N.double() * mask_N).sum(), mask_N.sum())}
    if rollouts.ref_logprobs_N is not None:
        sums |= drift_sums(student.logprobs_N, rollouts.ref_logprobs_N, rollouts.is_trained_N)
    return sums


def _mean(name: str, total: float, weight: float) -> float:
    """Mean of a metric; losses are sums already."""
    if name == "loss" or name.endswith("/loss"):
        return total
    return total / weight if weight else float("nan")


def _members(ids_NM: Tensor, widths: Sequence[int]) -> Tensor | None:
    """bool [N, S, M]: the columns that belong to each support; None when there is none."""
    if len(widths) == 1:
        return None
    block_M = torch.repeat_interleave(torch.tensor(widths)).to(ids_NM.device)
    support_S1 = torch.arange(1, len(widths), device=ids_NM.device)[:, None]
    return (block_M == support_S1).expand(len(ids_NM), -1, -1)


def _like_hidden(weight_VD: Tensor, hidden_ND: Tensor) -> Tensor:
    """The head in the hidden states' format on a GPU, where half-precision products are much faster."""
    return weight_VD.to(hidden_ND.dtype) if hidden_ND.is_cuda else weight_VD


def _not_finite(what: str, step: int, micro_batches: Sequence[Rows]) -> str:
    ids = [rollout_id for rows in micro_batches for rollout_id in rows.rollout_ids]
    named = ", ".join(ids[:NAMED_ROLLOUTS]) or "those of another device"
    more = f" and {len(ids) - NAMED_ROLLOUTS} more" if len(ids) > NAMED_ROLLOUTS else ""
    return (
        f"the {what} of step {step + 1} is not finite; rollouts in it: {named}{more}; look at them with "
        "`lightopd sql`, or lower the learning rate; the last checkpoint is kept"
    )


def _no_memory(rows: Rows, finetune: FinetuneConfig) -> str:
    longest = int((rows.prompts_R + rows.responses_R).max())
    padded = longest * len(rows.rollout_ids)
    remedies = [f"lower micro_batch_tokens (now {finetune.micro_batch_tokens}, at least {longest})"]
    if not finetune.gradient_checkpointing:
        remedies.append("set gradient_checkpointing to true")
    if finetune.precision == "32-true":
        remedies.append("set precision to bf16-mixed")
    return f"no memory for a micro-batch of {padded} padded tokens; {', or '.join(remedies)}"
