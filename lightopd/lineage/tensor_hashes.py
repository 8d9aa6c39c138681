"""Hash the tensors of safetensors files without loading them, once per file.

The hash of a tensor is that of its raw bytes, so how tensors are spread over files does not matter.
Results are kept in `lightopd/fingerprints.json` of the user's cache folder by path, size and time of
last change; that file can be deleted at any time.
"""

import hashlib
import json
import logging
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

from pydantic import BaseModel, Field, model_validator

from lightopd.errors import InputError, OutputError
from lightopd.files import write_atomically
from lightopd.under_way import doing

log = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format itself."""
SETTLED_NS = 2_000_000_000
"""A file changed this recently could change again under the same time stamp, so it is not remembered."""


class _Entry(BaseModel):
    """One tensor in a file's header."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, strict=True)]]
    data_offsets: tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[int, Field(ge=0, strict=True)]]

    @model_validator(mode="after")
    def _begins_before_its_end(self) -> "_Entry":
        if self.data_offsets[0] > self.data_offsets[1]:
            raise ValueError("a tensor begins behind its end")
        return self


class TensorHash(NamedTuple):
    """One stored tensor."""

    name: str
    dtype: str
    shape: list[int]
    sha256: str


@doing("hashing weights")
def hash_tensors(files: Iterable[Path]) -> list[TensorHash]:
    """Hash every tensor of some safetensors files, sorted by name.

    Files that were hashed before and have neither changed size nor time are not read again.

    Raises:
        InputError: a file is damaged, changes while it is read, or repeats a tensor of another file.
    """
    known = _read_known()
    fresh: dict[str, dict[str, Any]] = {}
    tensors: dict[str, TensorHash] = {}
    for file in files:
        for tensor in _hash_file(file, known, fresh):
            if tensor.name in tensors:
                raise InputError(
                    f"{file} repeats tensor {tensor.name!r} of another file; save the model again"
                )
            tensors[tensor.name] = tensor
    if fresh:
        _write_known(fresh)
    return [tensors[name] for name in sorted(tensors)]


def _hash_file(named: Path, known: dict[str, Any], fresh: dict[str, dict[str, Any]]) -> list[TensorHash]:
    file = named.resolve()  # a file of the hub's cache is a link to one named by its hash
    try:
        before = file.stat()
        stamp = {"size": before.st_size, "mtime_ns": before.st_mtime_ns}
        remembered = _remembered(known.get(str(file)), stamp)
        if remembered is not None:
            return remembered
        log.info("hashing %s (%.2f GB)", named, before.st_size / 1e9)
        started_ns = time.time_ns()
        with file.open("rb") as stream:
            tensors = _hash_stream(file, stream, before.st_size)
        after = file.stat()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise InputError(f"{file} changed while it was read; wait until it is complete and try again")
    if started_ns - before.st_mtime_ns > SETTLED_NS:
        fresh[str(file)] = {**stamp, "tensors": tensors}
    return tensors


def _hash_stream(file: Path, stream: BinaryIO, size_bytes: int) -> list[TensorHash]:
    start, header = _read_header(file, stream, size_bytes)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        first, last = entry["data_offsets"]
        stream.seek(start + first)
        digest = hashlib.sha256()
        left = last - first
        while left > 0:
            count = stream.readinto(buffer[: min(left, CHUNK_BYTES)])  # type: ignore[attr-defined]
            if count == 0:
                raise InputError(f"{file} ends inside tensor {name!r}; copy or download it again")
            digest.update(buffer[:count])
            left -= count
        tensors.append(TensorHash(name, entry["dtype"], entry["shape"], digest.hexdigest()))
    return tensors


def _read_header(file: Path, stream: BinaryIO, size_bytes: int) -> tuple[int, dict[str, Any]]:
    """Byte at which the tensors start, and the header without its free-text metadata."""
    damaged = InputError(
        f"{file} is not a whole safetensors file ({size_bytes} bytes); copy or download it again"
    )
    if size_bytes < 8:
        raise damaged
    (header_bytes,) = struct.unpack("<Q", stream.read(8))
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
        raise damaged
    try:
        text = stream.read(header_bytes)
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        last = max((_Entry.model_validate(entry).data_offsets[1] for entry in header.values()), default=0)
        if b"\\u" in text:  # half a pair of escapes is JSON, and no name
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged from error
    if 8 + header_bytes + last != size_bytes:
        raise damaged
    return 8 + header_bytes, header


def _remembered(entry: Any, stamp: dict[str, int]) -> list[TensorHash] | None:
    """The remembered tensors of a file, or None where it has changed or the entry makes no sense."""
    try:
        if {key: entry[key] for key in stamp} != stamp:
            return None
        return [TensorHash(*tensor) for tensor in entry["tensors"]]
    except (TypeError, KeyError):
        return None


def _known_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lightopd" / "fingerprints.json"


def _read_known() -> dict[str, Any]:
    path = _known_path()
    try:
        known = json.loads(path.read_text("utf-8"))
        if not isinstance(known, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used (%s); models are hashed again", path, error)
        return {}
    return known


def _write_known(fresh: dict[str, dict[str, Any]]) -> None:
    """Add entries to the remembered ones, and forget files that are gone."""
    path = _known_path()
    known = {file: entry for file, entry in {**_read_known(), **fresh}.items() if Path(file).exists()}
    try:
        write_atomically(path, json.dumps(known).encode(), shared=True)
    except OutputError as error:
        log.warning("%s: models will be hashed again next time", error)
