"""The shape of a signal's tail: the mean of its model's probabilities outside what it keeps, one vector.

It lies beside the signal's shards, is made before the first of them, and never changes: the signal's manifest
names its SHA-256, and every shard's marker names the manifest.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lightopd.cache.manifests import COPY_AGAIN, read_manifest, read_named, signal_folder
from lightopd.cache.shards import read_marker
from lightopd.cache.store import Cache
from lightopd.errors import CacheError
from lightopd.files import write_atomically
from lightopd.schemas.manifest import SIGNAL_MANIFEST, SignalManifest
from lightopd.schemas.signals.kinds import TailShape

TAIL_SHAPE = "tail_shape.safetensors"
"""File of the shape in a signal's folder: one tensor `shape`, float32 [V]."""
SUM_TOLERANCE = 1e-4
"""How far from one the entries may add up to; a vector rounded to float32 stays a thousand times closer."""

Shape = NDArray[np.float32]


def write_shape(folder: Path, sums_V: NDArray[np.float64], tokens: int) -> TailShape:
    """Store a shape in a signal's folder, whole or not at all; equal ones give equal bytes.

    Args:
        folder: of the signal.
        sums_V: probabilities outside the kept tokens, added up over positions; they are scaled to sum to one.
        tokens: how many positions.

    Raises:
        CacheError: an entry is not a finite probability, or nothing lies outside.
        OutputError: no permission or no space.
    """
    path = folder / TAIL_SHAPE
    _check(path, sums_V, total=None)
    content = save({"shape": (sums_V / sums_V.sum()).astype(np.float32)})
    write_atomically(path, content)
    return TailShape(sha256=hashlib.sha256(content).hexdigest(), tokens=tokens)


def read_shape(folder: Path, described: TailShape, num_vocab: int) -> Shape:
    """A signal's shape, checked against its manifest.

    Args:
        folder: of the signal.
        described: what the manifest says of it.
        num_vocab: width of the student's output.

    Raises:
        CacheError: the file is missing, damaged, not the one that the manifest names, of another vocabulary,
            or no distribution.
    """
    path = folder / TAIL_SHAPE
    content = read_named(path, described.sha256, "shape")
    try:
        shape_V: Shape = load(content)["shape"]
    except (SafetensorError, KeyError) as error:
        raise CacheError(f"{path} holds no tensor `shape` ({error}); {COPY_AGAIN}") from None
    if shape_V.shape != (num_vocab,) or shape_V.dtype != np.float32:
        found = f"{shape_V.dtype} {shape_V.shape}"
        raise CacheError(f"{path} holds {found}, the vocabulary needs float32 ({num_vocab},); {COPY_AGAIN}")
    _check(path, shape_V, total=1.0)
    return shape_V


def _check(path: Path, values_V: NDArray[np.floating], total: float | None) -> None:
    is_bad_V = ~np.isfinite(values_V) | (values_V < 0)
    if is_bad_V.any():
        place = int(is_bad_V.argmax())
        raise CacheError(f"{path}: entry {place} is {values_V[place]:g}, no probability; {COPY_AGAIN}")
    found = float(values_V.sum(dtype=np.float64))
    if found == 0 or (total is not None and abs(found - total) > SUM_TOLERANCE):
        raise CacheError(f"{path}: its entries sum to {found:.6g}, not to 1; {COPY_AGAIN}")


def shape_of(cache: Cache, signal: str) -> Shape | None:
    """The shape of a loaded signal's tail; None where it has none.

    Raises:
        CacheError: there is no such signal, or its shape is damaged.
    """
    manifest = cache.manifest_of(signal)
    if not isinstance(manifest, SignalManifest) or manifest.tail_shape is None:
        return None
    folder = signal_folder(cache.path, signal)
    return read_shape(folder, manifest.tail_shape, cache.manifest.vocabulary_size)


def begun_manifest(folder: Path, num_shards: int) -> SignalManifest | None:
    """The manifest that a signal's scoring began with; None where it has not begun.

    Raises:
        CacheError: the signal's manifest is broken.
    """
    if (folder / SIGNAL_MANIFEST).exists():
        return read_manifest(folder / SIGNAL_MANIFEST, SignalManifest)
    for index in range(num_shards):
        marker = read_marker(folder, index)
        if marker is not None and marker.made_from is not None:
            return SignalManifest.model_validate(marker.made_from)
    return None
