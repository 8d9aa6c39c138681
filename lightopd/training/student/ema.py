"""A moving average of the trained weights, which is measured and exported in their place.

After every step A <- d A + (1 - d) W; A begins as the student does. Training itself never sees A.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightopd.training.weight_files.tensor_shards import AVERAGE, StoredSet, has_set


class WeightAverage:
    """The average of the parameters that are trained, beside them and placed like them.

    Args:
        student: its parameters are averaged; where they are sharded, before its next forward pass.
        decay: d, in (0, 1).
        checkpoint: folder of a checkpoint to resume from; one without an average, or None, begins a new one.
    """

    def __init__(self, student: nn.Module, decay: float, checkpoint: Path | None = None) -> None:
        self._student = student
        self._trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.tensors: dict[str, Tensor] = {}
        """By the names of the parameters."""
        stored = StoredSet(checkpoint, AVERAGE) if checkpoint and has_set(checkpoint, AVERAGE) else None
        for name, parameter in self._trained.items():
            source = stored.like(name, parameter) if stored else parameter.detach()
            self.tensors[name] = source.clone()

    def update(self) -> None:
        """Take in the weights after a step."""
        trained = [parameter.detach() for parameter in self._trained.values()]
        self._update([*self.tensors.values()], trained, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The student has the averaged weights within; afterwards its own, to the last bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if isinstance(self._student, FSDPModule):
            self._student.reshard()  # what is gathered are copies, which would not follow
        for name, parameter in self._trained.items():
            own = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(own)


def load_average(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint; empty in one without them."""
    file = checkpoint / f"{AVERAGE}.safetensors"
    return load_file(file) if file.is_file() else {}


@torch.no_grad()
def lay_average(student: nn.Module, average: Mapping[str, Tensor]) -> None:
    """Give a student the averaged weights of a checkpoint."""
    for name, parameter in student.named_parameters():
        if name in average:
            parameter.copy_(average[name])
