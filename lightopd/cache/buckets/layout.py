"""What of a cache folder lies in a bucket: the same names, and a record that says whose they are.

    lightopd.json   rollouts/part-NNNNN.parquet + .json   signals/<name>/...   texts/<name>/...   heads/...
    rollouts/.lightopd.push   signals/<name>/.lightopd.push   texts/<name>/.lightopd.push

A part's record comes first, put where none is: it names the bytes of all shards of the part, so that two
caches never mix at one URL. Its shards follow, each one's marker after its file; the manifests come last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lightopd.cache.buckets.shard_cache import HEADS
from lightopd.cache.contexts import open_text, text_folder, text_names
from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.shards import marker_path, read_marker, shard_path
from lightopd.cache.store import Cache
from lightopd.errors import CacheError
from lightopd.files import json_bytes
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.manifest import CACHE_MANIFEST, SIGNAL_MANIFEST, TEXT_MANIFEST, ShardMarker

RECORD = ".lightopd.push"
ROLLOUTS = "rollouts"
MANIFESTS = {ROLLOUTS: CACHE_MANIFEST, "signals": SIGNAL_MANIFEST, "texts": TEXT_MANIFEST}


@dataclass(frozen=True, slots=True)
class Part:
    """Rollouts, a signal or a text column of a cache."""

    folder: str
    """Its folder, relative to the cache."""
    fingerprint: str
    """Of its manifest."""
    markers: tuple[ShardMarker, ...]
    """Of all its shards, in order."""

    @property
    def manifest(self) -> str:
        """Name of its manifest, relative to the cache."""
        return manifest_of(self.folder)

    def shard(self, index: int) -> str:
        """Name of a shard's file, relative to the cache."""
        return shard_path(Path(self.folder), index).as_posix()

    def marker(self, index: int) -> str:
        """Name of a shard's marker, relative to the cache."""
        return marker_path(Path(self.folder), index).as_posix()

    def record(self) -> bytes:
        """What says, at a URL, whose part lies there."""
        content = canonical_hash([marker.sha256 for marker in self.markers])
        return json_bytes({"fingerprint": self.fingerprint, "content": content})


def rollouts_of(cache: Cache) -> Part:
    """The rollouts of an opened cache."""
    return Part(ROLLOUTS, cache.manifest.fingerprint(), cache.markers)


def manifest_of(folder: str) -> str:
    """Name of the manifest of a part's folder, relative to the cache."""
    if folder == ROLLOUTS:
        return CACHE_MANIFEST
    return f"{folder}/{MANIFESTS[PurePosixPath(folder).parts[0]]}"


def parts_of(cache: Cache) -> list[Part]:
    """The parts of an opened cache: rollouts, the signals it was opened with, text columns.

    Raises:
        CacheError: a text column is not whole.
    """
    parts = [rollouts_of(cache)]
    for name, signal in cache.signals.items():
        folder = signal_folder(Path(), name).as_posix()
        parts.append(Part(folder, signal.manifest.fingerprint(), signal.markers))
    for name in text_names(cache.path):
        found = [read_marker(text_folder(cache.path, name), shard) for shard in cache.shards]
        markers = tuple(marker for marker in found if marker is not None)
        if len(markers) != len(found):
            raise CacheError(
                f"{text_folder(cache.path, name)} is incomplete; run the same `lightopd rewrite` again, it "
                "resumes"
            )
        folder = text_folder(Path(), name).as_posix()
        parts.append(Part(folder, open_text(cache, name).fingerprint(), markers))
    return parts


def small_files(cache: Path, folders: Sequence[str]) -> Iterator[str]:
    """Names of what lies beside the shards: configs, reports, contexts; no manifests, no index."""
    manifests = {manifest_of(folder) for folder in folders}
    for folder in (".", *folders):
        for path in sorted((cache / folder).iterdir()):
            name = path.relative_to(cache).as_posix()
            if path.is_file() and is_small(name) and name not in manifests:
                yield name


def heads_of(cache: Path) -> list[str]:
    """Names of the heads of hidden states in a cache on disk."""
    return [f"{HEADS}/{path.name}" for path in sorted((cache / HEADS).glob("*.safetensors"))]


def is_small(name: str) -> bool:
    """Whether a name is of a file beside the shards that travels: no shard, no index, nothing hidden."""
    last = PurePosixPath(name).name
    return not last.startswith((".", "part-", "index.duckdb"))


def folder_of(cache: Path, folder: str) -> Path:
    """Folder of a part in a cache on disk."""
    return rollouts_folder(cache) if folder == ROLLOUTS else cache / folder
