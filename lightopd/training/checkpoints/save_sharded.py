"""A checkpoint that all processes of a sharded run write together, each its own rows.

No process ever holds a whole set of tensors. Where one of them fails, every process learns it and raises the
same error, so that none is left waiting for it, and the first one removes what was written.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.errors import OutputError
from lightopd.files import output_error
from lightopd.schemas.configs import ModelConfig
from lightopd.training.checkpoints.checkpoint import (
    TrainerState,
    checkpoint_folders,
    complete_checkpoint,
    copy_companions,
    size_bytes,
)
from lightopd.training.distributed.fsdp import moments_of, weights_of
from lightopd.training.weight_files.tensor_shards import MODEL, OPTIMIZER, write_share

T = TypeVar("T")


def save_sharded(
    folder: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    student: ModelConfig,
    state: TrainerState,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all, and return it; every rank must call.

    Args:
        folder: the run's `checkpoints/`, the same on every rank.
        model: sharded by `fully_shard`.
        optimizer: over its parameters.
        student: where tokenizer and generation settings are copied from.
        state: step and identity of the run.
        more: further sets of tensors by name, placed like parameters.

    Raises:
        OutputError: no space or no permission on one of the ranks; older checkpoints are untouched.
    """
    part, final = checkpoint_folders(folder, state.step)
    is_first = dist.get_rank() == 0
    model.reshard()  # a pass without gradient leaves the outer group gathered
    sets = {MODEL: weights_of(model), OPTIMIZER: moments_of(model, optimizer), **(more or {})}
    total_bytes = size_bytes(model)
    try:
        _on_all(lambda: _begin(part, model, student) if is_first else None, final, total_bytes)
        sizes = _on_all(lambda: _write_shares(part, sets), final, total_bytes)
        _on_all(lambda: _end(part, final, state, sizes) if is_first else None, final, total_bytes)
    finally:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)
    return final


def _on_all(act: Callable[[], T], final: Path, total_bytes: int) -> list[T]:
    """Run `act` on every rank and return what it gave on each; where it failed on one, all of them raise."""
    own: tuple[Any, str | None]
    try:
        own = act(), None
    except OSError as error:
        own = None, str(output_error(error, final, total_bytes))
    except OutputError as error:
        own = None, str(error)
    everywhere: list[tuple[Any, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    for rank, (_, message) in enumerate(everywhere):
        if message is not None:
            raise OutputError(f"the process of rank {rank} {message}")
    return [value for value, _ in everywhere]


def _begin(part: Path, model: PreTrainedModel, student: ModelConfig) -> None:
    """What is not shared out: tokenizer, settings, and the code of a model that brings its own."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    copy_companions(student, part)
    model.save_pretrained(part, state_dict={})
    for weights in part.glob("*.safetensors"):
        weights.unlink()


def _write_shares(part: Path, sets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    place = dist.get_rank(), dist.get_world_size()
    files = [write_share(part / name, tensors, *place) for name, tensors in sets.items()]
    return {str(file.relative_to(part)): file.stat().st_size for file in files}


def _end(part: Path, final: Path, state: TrainerState, sizes: list[dict[str, int]]) -> None:
    for rank, written in enumerate(sizes):
        for name, size in written.items():
            if not (part / name).is_file() or (part / name).stat().st_size != size:
                raise OutputError(
                    f"cannot find {part / name}, which rank {rank} wrote; name an out folder all nodes see"
                )
    complete_checkpoint(part, final, state)
