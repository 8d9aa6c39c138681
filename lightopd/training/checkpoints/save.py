"""A checkpoint as all processes of a run write it together.

The first process writes it, or, where the whole student is shared out, each its own rows. Where one of them
fails, every process learns it and raises the same error, so that none is left waiting for it, and the first
one removes what was written.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightopd.errors import OutputError
from lightopd.files import output_error
from lightopd.schemas.configs import ModelConfig
from lightopd.training.checkpoints.checkpoint import (
    TrainerState,
    checkpoint_folders,
    complete_checkpoint,
    hash_files,
)
from lightopd.training.checkpoints.export import copy_companions
from lightopd.training.distributed.fsdp import moments_of, on_host, weights_of
from lightopd.training.student.adapters import is_adapted, save_student
from lightopd.training.weight_files.tensor_shards import MODEL, OPTIMIZER, write_share

T = TypeVar("T")


def save_checkpoint(
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
        model: the student; its weights are stored in the number format they are trained in.
        optimizer: over the parameters of `model`.
        student: where tokenizer and generation settings are copied from.
        state: step and identity of the run.
        more: further sets of tensors by name, placed like parameters.

    Raises:
        OutputError: no space or no permission on one of the ranks; older checkpoints are untouched.
    """
    part, final = checkpoint_folders(folder, state.step)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    in_shares = isinstance(model, FSDPModule) and not is_adapted(model)
    if isinstance(model, FSDPModule):
        model.reshard()  # a pass without gradient leaves the outer group gathered
    sets = {OPTIMIZER: moments_of(model, optimizer), **(more or {})}
    if in_shares:
        sets |= {MODEL: weights_of(model)}
        begin = partial(_begin, part, student, partial(_save_settings, model, part))
    else:
        trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        weights = on_host(trained, keep=is_first) if isinstance(model, FSDPModule) else None
        sets = {name: on_host(tensors, keep=is_first) for name, tensors in sets.items()}
        begin = partial(_begin, part, student, partial(save_student, model, part, weights))
    total_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    try:
        _on_all(begin if is_first else lambda: None, final, total_bytes)
        written = _on_all(partial(_write, part, sets, in_shares=in_shares), final, total_bytes)
        end = partial(_end, part, final, state, written)
        _on_all(end if is_first else lambda: None, final, total_bytes)
    finally:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)
    return final


def _on_all(act: Callable[[], T], final: Path, total_bytes: int) -> list[T]:
    """Run `act` on every rank and return what it gave on each; where it failed on one, all of them raise."""
    own: tuple[Any, str | None]
    try:
        own = act(), None
    except (OSError, SafetensorError) as error:
        own = None, str(output_error(error, final, total_bytes))
    except OutputError as error:
        own = None, str(error)
    everywhere: list[tuple[Any, str | None]] = [own]
    if dist.is_initialized():
        everywhere *= dist.get_world_size()
        dist.all_gather_object(everywhere, own)
    for rank, (_, message) in enumerate(everywhere):
        if message is not None:
            raise OutputError(f"the process of rank {rank} {message}" if len(everywhere) > 1 else message)
    return [value for value, _ in everywhere]


def _begin(part: Path, student: ModelConfig, save_model: Callable[[], None]) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    copy_companions(student, part)
    save_model()


def _save_settings(model: PreTrainedModel, part: Path) -> None:
    """What lies beside weights: the config, and the code of a model that brings its own."""
    model.save_pretrained(part, state_dict={})
    for weights in part.glob("*.safetensors"):
        weights.unlink()


def _write(part: Path, sets: Mapping[str, Mapping[str, Tensor]], *, in_shares: bool) -> dict[str, str]:
    """Write this process's share of the sets, or all of what it holds; returns the SHA-256 of shares."""
    if in_shares:
        place = dist.get_rank(), dist.get_world_size()
        files = [write_share(part / name, tensors, *place) for name, tensors in sets.items()]
        return hash_files({str(file.relative_to(part)): file for file in files})
    for name, tensors in sets.items():
        if tensors:
            save_file(dict(tensors), part / f"{name}.safetensors")
    return {}


def _end(part: Path, final: Path, state: TrainerState, written: list[dict[str, str]]) -> None:
    for rank, hashes in enumerate(written):
        for name in hashes:
            if not (part / name).is_file():
                raise OutputError(
                    f"cannot find {part / name}, which rank {rank} wrote; name an out folder all nodes see"
                )
    complete_checkpoint(part, final, state, {name: sha for hashes in written for name, sha in hashes.items()})
