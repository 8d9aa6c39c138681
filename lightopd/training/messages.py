"""What the trainer says when a step cannot be done."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightopd.errors import TrainingError
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.data.batches import HostBatch
from lightopd.training.student.compile import is_of_compiler

NO_CPU_MEMORY = ("can't allocate memory", "not enough memory")
"""How torch's CPU allocator says it, in a plain RuntimeError."""
NAMED_ROLLOUTS = 8
"""Rollouts that an error names one by one."""

LOWER_RATE = "lower optimizer.lr and begin in another out folder; checkpoints made before, if any, are kept"


def few_rollouts(batch: int, rollouts: int) -> tuple[str, ...]:
    """What is said before steps that take the same rollouts several times; nothing where none does."""
    if batch <= rollouts:
        return ()
    return (
        f"each step of {batch} rollouts repeats the {rollouts} that there are about {batch / rollouts:.0f} "
        f"times; set batch_sequences to {rollouts} or less, or roll out more",
    )


def not_finite(what: str, step: int, ids: Sequence[str]) -> str:
    """A number that must be finite is not; names the rollouts it was made from."""
    named = ", ".join(ids[:NAMED_ROLLOUTS])
    more = f" and {len(ids) - NAMED_ROLLOUTS} more" if len(ids) > NAMED_ROLLOUTS else ""
    return (
        f"the {what} of step {step + 1} is not finite; rollouts in it: {named}{more}; look at them with "
        f"`lightopd sql`, or {LOWER_RATE}"
    )


def broken_weights(step: int, count: int) -> str:
    """A step left weights that are not finite."""
    return f"{count} weight tensors are not finite after step {step}, which is not kept; {LOWER_RATE}"


def no_memory(rows: HostBatch, finetune: FinetuneConfig) -> str:
    """A micro-batch is larger than memory; names the settings that make it smaller."""
    longest = int((rows.prompts_R + rows.responses_R).max())
    padded = longest * len(rows.rollout_ids)
    remedies = [f"lower micro_batch_tokens (now {finetune.micro_batch_tokens}, at least {longest})"]
    if not finetune.gradient_checkpointing:
        remedies.append("set gradient_checkpointing to true")
    if finetune.precision == "32-true":
        remedies.append("set precision to bf16-mixed")
    return f"no memory for a micro-batch of {padded} padded tokens; {', or '.join(remedies)}"


def no_optimizer_memory(trained: int, finetune: FinetuneConfig) -> str:
    """The moments of the optimiser find no room; names what makes them smaller."""
    remedies = (
        ["train an adapter (adapter.kind lora)"] if finetune.adapter is None else ["lower adapter.rank"]
    )
    if finetune.strategy != "fsdp":
        remedies.append("share them over several devices (strategy fsdp)")
    return (
        f"no memory for an optimiser step: AdamW keeps {8 * trained / 1e9:.2f} GB of moments for {trained} "
        f"trained parameters; {', or '.join(remedies)}"
    )


def no_compiler(error: RuntimeError) -> str:
    """The student's layers cannot be compiled here; keeps the first line of what torch says."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"the student cannot be compiled here ({reason}); install what is missing (a C++ compiler on a CPU, "
        "triton on a GPU), or leave compile out"
    )


@contextmanager
def memory_named(student: nn.Module, finetune: FinetuneConfig, rows: HostBatch | None) -> Iterator[None]:
    """Turn a lack of memory into the numbers to change, and that of a compiler into its name.

    Args:
        student: what is trained.
        finetune: settings of the run.
        rows: the largest micro-batch that is run; None for the optimiser's own step.
    """
    try:
        yield
    except RuntimeError as error:
        if is_of_compiler(error):
            raise TrainingError(no_compiler(error)) from error
        is_memory = isinstance(error, torch.OutOfMemoryError)
        if not is_memory and not any(words in str(error) for words in NO_CPU_MEMORY):
            raise
        if rows is not None:
            raise TrainingError(no_memory(rows, finetune)) from error
        trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
        raise TrainingError(no_optimizer_memory(trained, finetune)) from error


def named_everywhere(micro_batches: Sequence[HostBatch]) -> list[str]:
    """Rollouts in these micro-batches of all ranks, so that any rank can name them."""
    ids = [rollout_id for rows in micro_batches for rollout_id in rows.rollout_ids]
    if not (dist.is_available() and dist.is_initialized()):
        return ids
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, ids)
    return [rollout_id for found in everywhere for rollout_id in found]
