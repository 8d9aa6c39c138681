"""Hidden states as shards hold them: codes, a scale for each token, the statistics of each channel.

The statistics are made before the first shard and never change: the signal's manifest names their SHA-256.

N = response tokens, D = hidden size.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lightopd.cache.manifests import COPY_AGAIN, read_named
from lightopd.errors import CacheError
from lightopd.files import write_atomically
from lightopd.schemas.records import Floats, HiddenCodes
from lightopd.schemas.signals.kinds import HiddenStates

CHANNELS = "hidden_channels.safetensors"
"""File in a signal's folder: tensors `mean` and `std`, float32 [D]."""
BYTES = {"int8": 1, "bfloat16": 2}
"""Of a value, by format."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Mean and standard deviation of each channel over the calibration sample."""

    mean_D: Floats
    std_D: Floats
    """Above 0."""


@dataclass(frozen=True, slots=True)
class HiddenColumns:
    """Hidden states of response tokens, as they are stored."""

    codes_ND: HiddenCodes
    """int8, or bfloat16 as its 16 bits."""
    scales_N: Floats | None
    """Of int8: what one step of a token's codes is worth, in standard deviations."""
    channels: Channels | None
    """Of int8."""

    def __getitem__(self, chosen: "slice | NDArray[np.bool_]") -> "HiddenColumns":
        scales_N = None if self.scales_N is None else self.scales_N[chosen]
        return HiddenColumns(self.codes_ND[chosen], scales_N, self.channels)


def joined(parts: list[HiddenColumns]) -> HiddenColumns:
    """Hidden states of one signal, laid end to end; at least one part."""
    scales = [part.scales_N for part in parts if part.scales_N is not None]
    codes_ND: Any = np.concatenate([part.codes_ND for part in parts])
    return HiddenColumns(codes_ND, np.concatenate(scales) if scales else None, parts[0].channels)


def channels_from_sums(sums_D: NDArray[np.float64], squares_D: NDArray[np.float64], tokens: int) -> Channels:
    """Statistics from sums over so many tokens; a channel that never changes counts as of deviation 1."""
    mean_D = sums_D / tokens
    variance_D = np.maximum(squares_D / tokens - mean_D**2, 0)
    std_D = np.sqrt(variance_D).astype(np.float32)
    return Channels(mean_D.astype(np.float32), np.where(std_D > 0, std_D, np.float32(1)))


def write_channels(folder: Path, channels: Channels) -> str:
    """Store statistics in a signal's folder; their SHA-256. Equal ones give equal bytes.

    Raises:
        CacheError: a value is not finite.
        OutputError: no permission or no space.
    """
    path = folder / CHANNELS
    _check(path, channels)
    content = save({"mean": channels.mean_D, "std": channels.std_D})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_channels(folder: Path, described: HiddenStates) -> Channels | None:
    """A signal's statistics, checked against its manifest; None where its format needs none.

    Raises:
        CacheError: the file is missing, damaged, not the one that the manifest names, or of another size.
    """
    if described.channels is None:
        return None
    path = folder / CHANNELS
    content = read_named(path, described.channels, "file")
    try:
        tensors = load(content)
        channels = Channels(tensors["mean"], tensors["std"])
    except (SafetensorError, KeyError) as error:
        raise CacheError(f"{path} does not hold the tensors mean and std ({error}); {COPY_AGAIN}") from None
    for name, values_D in tensors.items():
        if values_D.shape != (described.size,) or values_D.dtype != np.float32:
            found = f"{values_D.dtype} {values_D.shape}"
            raise CacheError(f"{path}: {name} is {found}, not float32 ({described.size},); {COPY_AGAIN}")
    _check(path, channels)
    return channels


def _check(path: Path, channels: Channels) -> None:
    is_bad_D = ~np.isfinite(channels.mean_D) | ~np.isfinite(channels.std_D) | (channels.std_D <= 0)
    if is_bad_D.any():
        place = int(is_bad_D.argmax())
        found = f"mean {channels.mean_D[place]:g} and deviation {channels.std_D[place]:g}"
        raise CacheError(f"{path}: channel {place} has {found}, no statistics; {COPY_AGAIN}")


def hidden_columns(table: pa.Table, described: HiddenStates, channels: Channels | None) -> HiddenColumns:
    """The hidden states of a shard's rows, laid end to end; a view into the table where it is one chunk.

    Raises:
        ValueError: a row's bytes are no whole number of hidden states.
    """
    flat, ends = flat_bytes(table.column("hidden"))
    width = described.size * BYTES[described.format]
    if (ends % width).any():
        raise ValueError(f"hidden has rows that are no multiple of {width} bytes")
    codes_ND: Any = flat.view(np.int8 if described.format == "int8" else np.dtype("<u2"))
    scales_N = None
    if described.channels is not None:
        lists = table.column("hidden_scales").combine_chunks()
        scales_N = lists.flatten().to_numpy(zero_copy_only=False)
    return HiddenColumns(codes_ND.reshape(-1, described.size), scales_N, channels)


def flat_bytes(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Bytes of a column of large binaries laid end to end, and its offsets [rows + 1], which start at 0."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    _, offsets, values = array.buffers()
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    flat = np.frombuffer(values, np.uint8) if values is not None else np.zeros(0, np.uint8)
    return flat[ends[0] : ends[-1]], ends - ends[0]
