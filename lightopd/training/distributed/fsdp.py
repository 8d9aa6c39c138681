"""Fully sharded training (FSDP2): every device keeps a share of weights, gradients and moments.

A decoder layer is gathered when it runs and freed again. What lies around the layers (embedding, final norm,
output head) is one group that stays gathered from the forward to the end of the backward pass, because the
loss reads the head's weight after the model has run.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightopd.models.head import decoder_output

FORWARD = "sharded_decoder_output"
"""Method of a sharded student that gathers its outer group and runs its decoder."""


def shard_student(student: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a student in place over the ranks of a one-dimensional mesh."""
    kinds = tuple(student._no_split_modules or ())
    for module in student.modules():
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(student, mesh=mesh, reshard_after_forward=False)
    setattr(student, FORWARD, MethodType(decoder_output, student))
    register_fsdp_forward_method(student, FORWARD)


def output_of(student: PreTrainedModel, **inputs: Any) -> Any:
    """`decoder_output`, after which the weight of the output head is whole on every rank."""
    if not isinstance(student, FSDPModule):
        return decoder_output(student, **inputs)
    return getattr(student, FORWARD)(**inputs)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the ranks share in parts; every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_of(student: PreTrainedModel) -> dict[str, Tensor]:
    """What is stored of a student, by the names of its state, where it lies; tied weights once."""
    ignored = student._keys_to_ignore_on_save or ()
    names: dict[Tensor, str] = {}
    for name, tensor in student.state_dict(keep_vars=True).items():
        if name not in ignored:
            names.setdefault(tensor, name)
    return {name: tensor for tensor, name in names.items()}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimiser over a model's parameters, `key/parameter`, where it lies, in float32."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[parameter]}": value.dequantize() if hasattr(value, "codes") else value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def count_broken(student: nn.Module) -> Tensor:
    """How many trained parameters, or this rank's shares of them, hold a number that is not finite."""
    trained = [parameter.detach() for parameter in student.parameters() if parameter.requires_grad]
    shares = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in trained]
    return torch.stack([~share.isfinite().all() for share in shares]).sum()


def on_host(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies of tensors on the host where `keep`, else nothing; all ranks must call for shared ones."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered
