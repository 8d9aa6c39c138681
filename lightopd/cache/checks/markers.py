"""What markers of one folder tell of its shards: of other settings, under another name, with rows too few."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lightopd.cache.checks.seals import is_changed
from lightopd.cache.manifests import differences, shard_numbers
from lightopd.cache.shards import marker_path, read_marker, why_invalid
from lightopd.schemas.base import StrictModel
from lightopd.schemas.manifest import CacheManifest, ShardMarker, SignalManifest

MOST_SETTINGS = 4
"""Settings that one message names."""


def shard_fault(folder: Path, index: int, manifest: CacheManifest | SignalManifest) -> str | None:
    """What is wrong with a shard as a file, in words; None where marker, name, size and bytes hold."""
    marker, fingerprint = read_marker(folder, index), manifest.fingerprint()
    if marker is not None:
        if is_changed(marker_path(folder, index)):
            return "its marker was changed after it was written: its checksum does not hold"
        if marker.shard is not None and marker.shard != index:
            return f"it is a copy of shard {marker.shard}, or that shard renamed"
        theirs: Any = _manifest_in(marker, type(manifest))
        wanted: Any = manifest  # of the same kind as theirs
        if theirs is not None and theirs.fingerprint() != marker.fingerprint:
            return "its marker was changed after it was written: its manifest is not that of its fingerprint"
        if marker.fingerprint != fingerprint and theirs is not None:
            found = differences(theirs, wanted)
            more = f" and {len(found) - MOST_SETTINGS} more" if len(found) > MOST_SETTINGS else ""
            return f"it was made under other settings ({'; '.join(found[:MOST_SETTINGS])}{more})"
    return why_invalid(folder, index, fingerprint)


def copied_shards(folder: Path) -> Mapping[int, int]:
    """Shards whose file is, byte for byte, that of an earlier one, with its number; empty ones left out."""
    first: dict[str, int] = {}
    copies = {}
    for index in shard_numbers(folder):
        marker = read_marker(folder, index)
        if marker is not None and marker.rows and first.setdefault(marker.sha256, index) != index:
            copies[index] = first[marker.sha256]
    return copies


def row_count_faults(folder: Path, manifest: CacheManifest) -> Iterator[tuple[int, str]]:
    """Shards of sampled rollouts that hold another number of rows than their prompts make, in words."""
    if manifest.sampling is None or manifest.made_of:
        return
    n = manifest.sampling.n
    width, last = max(1, manifest.shard_rollouts // n), manifest.num_shards - 1
    for index in range(manifest.num_shards):
        marker = read_marker(folder, index)
        wanted = n * (width if index < last else manifest.num_prompts - width * last)
        if marker is not None and marker.rows + sum(marker.dropped.values()) != wanted:
            yield index, f"it has {marker.rows} rows, its prompts make {wanted}"


def _manifest_in(marker: ShardMarker, kind: type[StrictModel]) -> StrictModel | None:
    """The manifest that a marker holds; None where it holds none, or none that this version can read."""
    try:
        return None if marker.made_from is None else kind.model_validate(marker.made_from)
    except ValidationError:
        return None
