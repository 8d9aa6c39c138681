"""Safetensors files written tensor by tensor, so that none of them is ever whole in memory."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightopd.files import flush

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How the format calls a tensor's numbers."""


class TensorLayout(NamedTuple):
    """Numbers and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


class TensorWriter:
    """Writes one file whose tensors may come in any order; leaving it flushes the file to the disk.

    Args:
        path: of the file; its folder exists.
        layouts: every tensor that will be written, by name.
        metadata: free text beside them.

    Raises:
        OSError: no space or no permission, here or while tensors are written.
    """

    def __init__(self, path: Path, layouts: Mapping[str, TensorLayout], metadata: Mapping[str, str]) -> None:
        self.path = path
        self._offsets: dict[str, tuple[int, int]] = {}
        last = 0
        for name in sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name)):
            first, last = last, last + layouts[name].size_bytes
            self._offsets[name] = first, last
        entries = {
            name: {
                "dtype": DTYPES[layouts[name].dtype],
                "shape": list(layouts[name].shape),
                "data_offsets": list(offsets),
            }
            for name, offsets in self._offsets.items()
        }
        header = json.dumps({"__metadata__": dict(metadata), **entries}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._start = 8 + len(header)
        self._stream = path.open("wb")
        self._stream.write(struct.pack("<Q", len(header)) + header)
        self._left = set(layouts)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it may lie on any device."""
        content = bytes_of(tensor)
        first, last = self._offsets[name]
        assert len(content) == last - first, name
        self._stream.seek(self._start + first)
        self._stream.write(content)
        self._left.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if error is None:
            assert not self._left, f"{self.path} was left without {sorted(self._left)}"
            flush(self.path)


def bytes_of(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, rows one after another, as the format stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
