"""Sets of tensors that the processes of a run store in shares, each its own rows, in one folder for a set.

    step-000050/model/rank-00000-of-00008.safetensors   step-000050/optimizer/rank-00000-of-00008.safetensors

Every file is plain safetensors and says at which row its part of a tensor begins, in the words of torch's
`HuggingFaceStorageReader`, which reads such a folder too (docs/decisions/0005). A set that one process wrote
is one file, and is read here in the same way, so that a run on any number of devices resumes from either.
"""

# D = rows of a whole tensor (its first axis), N = those of one file

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightopd.errors import InputError
from lightopd.files import flush
from lightopd.lineage.tensor_hashes import TensorHash

MODEL, OPTIMIZER, AVERAGE, JUMP_ANCHOR = "model", "optimizer", "average", "jump_anchor"
"""Sets of a checkpoint; weights have the names of the model's state, moments `key/parameter`."""
INFO = "DCP_SHARDING_INFO"
"""Where torch looks for the offsets, in a file's metadata."""


def write_share(folder: Path, tensors: Mapping[str, Tensor], rank: int, world_size: int) -> Path:
    """Write this process's rows of every tensor of a set, and flush the file.

    Args:
        folder: of the set; made where it is missing.
        tensors: the same names on every rank; those that are not shared out are written by rank 0.
        rank: of this process, which need not hold rows of every tensor.
        world_size: number of processes.

    Raises:
        OSError, SafetensorError: no space or no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    offsets, own = {}, {}
    for name, tensor in tensors.items():
        first, rows = own_rows(tensor)
        if len(rows) if isinstance(tensor, DTensor) else rank == 0:
            offsets[name] = {"saved_offsets": [first, *[0] * (rows.ndim - 1)][: rows.ndim]}
            own[name] = rows.cpu().contiguous()
    path = folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    save_file(own, path, metadata={INFO: json.dumps(offsets, sort_keys=True)})  # two keys come in any order
    flush(path)
    return path


def own_rows(tensor: Tensor) -> tuple[int, Tensor]:
    """Where this process's rows of a tensor begin, and the rows; all of them where it is not shared out."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.detach()
    first, last = _bounds(tensor)
    local: Tensor = tensor.to_local().detach()
    assert len(local) == last - first
    return first, local


def is_shared(checkpoint: Path) -> bool:
    """Whether the weights of a checkpoint are stored in shares."""
    return (checkpoint / MODEL).is_dir()


def has_set(checkpoint: Path, name: str) -> bool:
    """Whether a checkpoint has a set, in shares or whole."""
    return (checkpoint / name).is_dir() or (checkpoint / f"{name}.safetensors").is_file()


def whole_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that are stored in shares, whole and on the host."""
    stored = StoredSet(checkpoint, MODEL)
    return {name: stored.whole(name) for name in stored}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a tensor in one file."""

    file: Any
    first: int
    num_rows: int


class StoredSet:
    """Reads tensors of a set, whole or in part, whoever wrote it.

    Args:
        checkpoint: folder of the checkpoint.
        name: of the set: a folder of shares there, or one file with the ending `.safetensors`.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, checkpoint: Path, name: str) -> None:
        folder = checkpoint / name
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [Path(f"{folder}.safetensors")]
        self._pieces: dict[str, list[_Piece]] = {}
        self._layouts: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in files:
            try:
                self._open(path)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}); delete the checkpoint, and run again"
                ) from error
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.first)

    def _open(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        offsets = json.loads((file.metadata() or {}).get(INFO, "{}"))
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            first = [*offsets.get(name, {}).get("saved_offsets", ()), 0][0]
            rows = shape[0] if shape else 1
            _, whole = self._layouts.get(name, ("", shape))
            shape = (max(whole[0], first + rows), *shape[1:]) if shape else shape
            self._layouts[name] = part.get_dtype(), shape
            self._pieces.setdefault(name, []).append(_Piece(file, first, rows))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._layouts))

    def __contains__(self, name: str) -> bool:
        return name in self._layouts

    def whole(self, name: str) -> Tensor:
        """A tensor of the set on the host, all of it."""
        return self.rows(name)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` of a tensor, on the host; only they are read."""
        pieces = self._pieces[name]
        _, shape = self._layouts[name]
        if not shape:
            return _tensor(pieces[0].file.get_tensor(name))
        last = shape[0] if last is None else last
        parts = [
            piece.file.get_slice(name)[max(first - piece.first, 0) : min(last - piece.first, piece.num_rows)]
            for piece in pieces
            if piece.first < last and piece.first + piece.num_rows > first
        ]
        if not parts:
            return _tensor(pieces[0].file.get_slice(name)[:0])
        return _tensor(torch.cat(parts) if len(parts) > 1 else parts[0])

    def outline(self, name: str) -> Tensor:
        """A tensor of the same shape and numbers, without content (on torch's `meta` device)."""
        return self.rows(name, 0, 0).new_empty(self._layouts[name][1], device="meta")

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """A tensor of the set, where and how a parameter lies; a process reads its own rows alone."""
        if not isinstance(parameter, DTensor):
            return self.whole(name).to(parameter.device)
        rows = self.rows(name, *_bounds(parameter)).to(parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        return DTensor.from_local(
            rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    def hashes(self) -> list[TensorHash]:
        """As `hash_tensors` gives them, so that they do not depend on the number of files."""
        return [TensorHash(name, *self._described(name), self._digest(name)) for name in self]

    def _described(self, name: str) -> tuple[str, list[int]]:
        dtype, shape = self._layouts[name]
        return dtype, list(shape)

    def _digest(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces[name]:
            digest.update(_tensor(piece.file.get_tensor(name)).reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _bounds(tensor: DTensor) -> tuple[int, int]:
    """First row of this process, and the first of the next one, as `fully_shard` deals rows out."""
    mesh, num_rows = tensor.device_mesh, tensor.shape[0]
    each = -(-num_rows // mesh.size())
    rank = mesh.get_local_rank()
    return min(rank * each, num_rows), min((rank + 1) * each, num_rows)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
