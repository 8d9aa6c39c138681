"""Fully sharded training (FSDP2): every device keeps a share of weights, gradients and moments.

A decoder layer is gathered when it runs and freed again. What lies around the layers (embedding, final norm,
output head) is one group that stays gathered from the forward to the end of the backward pass, because the
loss reads the head's weight after the model has run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lightopd.engines.models import last_hidden

FORWARD = "sharded_last_hidden"
"""Method of a sharded student that gathers its outer group and runs its decoder."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Whole tensors of a sharded student on the host of the first rank; empty on the others."""

    weights: dict[str, Tensor]
    """By the names of the model's state; tied names share a tensor."""
    moments: dict[str, Tensor]
    """State of the optimiser, `key/parameter`."""
    average: dict[str, Tensor]
    """Averaged weights, by the names of the parameters."""


def shard_student(student: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a student in place over the ranks of a one-dimensional mesh."""
    kinds = tuple(student._no_split_modules or ())
    for module in student.modules():
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(student, mesh=mesh, reshard_after_forward=False)
    setattr(student, FORWARD, MethodType(last_hidden, student))
    register_fsdp_forward_method(student, FORWARD)


def hidden_of(student: PreTrainedModel, **inputs: Any) -> Tensor:
    """`last_hidden`, after which the weight of the output head is whole on every rank."""
    if not isinstance(student, FSDPModule):
        return last_hidden(student, **inputs)
    hidden_BTD: Tensor = getattr(student, FORWARD)(**inputs)
    return hidden_BTD


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks share in parts; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, where and how a parameter lies."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def gather(
    student: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor], *, keep: bool
) -> Gathered | None:
    """Collect a sharded student and its optimiser, tensor by tensor; None when it is not sharded.

    Args:
        student: the same on every rank; all ranks must call.
        optimizer: over its parameters.
        average: averaged weights, sharded like the student; empty where none are kept.
        keep: whether this rank keeps what it gathers.
    """
    if not isinstance(student, FSDPModule):
        return None
    student.reshard()  # a pass without gradient leaves the outer group gathered
    weights: dict[str, Tensor] = {}
    known: dict[Tensor, Tensor] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if tensor not in known:
            known[tensor] = _on_host(tensor, keep=keep)
        weights[name] = known[tensor]
    names: dict[Tensor, str] = {parameter: name for name, parameter in student.named_parameters()}
    moments = {
        f"{key}/{names[parameter]}": _on_host(value, keep=keep)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    averaged = {name: _on_host(tensor, keep=keep) for name, tensor in average.items()}
    return Gathered(weights, moments, averaged) if keep else Gathered({}, {}, {})


def _on_host(tensor: Tensor, *, keep: bool) -> Tensor:
    full = whole(tensor.detach())
    return full.cpu().contiguous() if keep else full.new_empty(0)
