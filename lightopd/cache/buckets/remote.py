"""A cache at a URL, as its manifests and the list of its objects tell it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lightopd.cache.buckets.layout import RECORD, ROLLOUTS, manifest_of
from lightopd.cache.buckets.stores.object_reader import ObjectReader, sent_with
from lightopd.cache.manifests import parsed_manifest
from lightopd.cache.shards import AGAIN, marker_of, marker_path, shard_path
from lightopd.errors import CacheError
from lightopd.schemas.manifest import CACHE_MANIFEST, CacheManifest, ShardMarker, SignalManifest, TextManifest


@dataclass(frozen=True, slots=True)
class RemotePart:
    """Rollouts, a signal or a text column of a cache at a URL."""

    folder: str
    """Its folder, relative to the cache."""
    manifest: bytes
    """Its manifest as it lies there."""
    fingerprint: str
    """Of the manifest."""
    num_shards: int

    def shard(self, index: int) -> str:
        """Name of a shard's file, relative to the cache."""
        return shard_path(Path(self.folder), index).as_posix()

    def marker(self, index: int) -> str:
        """Name of a shard's marker, relative to the cache."""
        return marker_path(Path(self.folder), index).as_posix()


def remote_parts(
    reader: ObjectReader, there: Mapping[str, int], signals: Sequence[str] | None
) -> tuple[list[RemotePart], list[str]]:
    """The whole parts of a cache at a URL, and the folders of those that are not pushed to their end.

    Args:
        reader: of the URL.
        there: sizes of its objects.
        signals: names of signals that are wanted; None takes all that are whole.

    Raises:
        CacheError: no cache is there, it is half pushed, or a wanted signal or a shard is not there.
    """
    if CACHE_MANIFEST not in there:
        raise CacheError(no_cache(reader.url, there))
    content, manifest = _manifest(reader, CACHE_MANIFEST, CacheManifest)
    parts = [RemotePart(ROLLOUTS, content, manifest.fingerprint(), manifest.num_shards)]
    unfinished = []
    for folder in _folders(there):
        if (
            folder.startswith("signals/")
            and signals is not None
            and PurePosixPath(folder).name not in signals
        ):
            continue
        if manifest_of(folder) not in there:
            unfinished.append(folder)
            continue
        content, fingerprint = _of_part(reader, folder, manifest.fingerprint())
        parts.append(RemotePart(folder, content, fingerprint, manifest.num_shards))
    found = {part.folder for part in parts}
    for name in signals or ():
        if f"signals/{name}" not in found:
            state = "is half pushed" if f"signals/{name}" in unfinished else "is not there"
            raise CacheError(
                f"{reader.url}: signal {name!r} {state}; send it there with {sent_with(reader.url)}"
            )
    _check_complete(reader.url, parts, there)
    return parts, unfinished


def parsed_marker(content: bytes | None, part: RemotePart, index: int, url: str) -> ShardMarker:
    """The marker of a shard from the bytes that lie at a URL.

    Raises:
        CacheError: it is broken, or of other settings than its manifest.
    """
    marker = marker_of(content or b"")
    if marker is None:
        raise CacheError(f"{url}/{part.marker(index)} is not a valid marker; {AGAIN}")
    if marker.fingerprint != part.fingerprint:
        raise CacheError(f"{url}/{part.marker(index)} is of other settings than {part.folder}; {AGAIN}")
    return marker


def remote_fingerprint(reader: ObjectReader, folder: str) -> str:
    """Fingerprint of the manifest of a part at a URL.

    Raises:
        CacheError: the manifest is broken.
    """
    if folder == ROLLOUTS:
        return _manifest(reader, CACHE_MANIFEST, CacheManifest)[1].fingerprint()
    return _of_part(reader, folder, None)[1]


def _manifest(reader: ObjectReader, name: str, kind: type[CacheManifest]) -> tuple[bytes, CacheManifest]:
    content = reader.read(name) or b""
    return content, parsed_manifest(content, f"{reader.url}/{name}", kind)


def _of_part(reader: ObjectReader, folder: str, rollouts: str | None) -> tuple[bytes, str]:
    name = manifest_of(folder)
    content, where = reader.read(name) or b"", f"{reader.url}/{name}"
    manifest: SignalManifest | TextManifest
    if folder.startswith("signals/"):
        manifest = parsed_manifest(content, where, SignalManifest)
    else:
        manifest = parsed_manifest(content, where, TextManifest)
    if rollouts is not None and manifest.rollouts != rollouts:
        raise CacheError(
            f"{where} speaks of other rollouts than {CACHE_MANIFEST} there; send the cache there again with "
            f"{sent_with(reader.url)}"
        )
    return content, manifest.fingerprint()


def _folders(there: Mapping[str, int]) -> list[str]:
    """Folders of signals and text columns, sorted."""
    names = (PurePosixPath(name).parts for name in there)
    return sorted(
        {"/".join(parts[:2]) for parts in names if parts[0] in ("signals", "texts") and len(parts) == 3}
    )


def no_cache(url: str, there: Mapping[str, object]) -> str:
    """What is wrong with a URL that has no manifest of a cache, in words."""
    if f"{ROLLOUTS}/{RECORD}" in there:
        shards = sum(name.endswith(".parquet") for name in there)
        return (
            f"{url} is half pushed ({shards} shards are there); run the same `lightopd push` again, "
            "it resumes"
        )
    what = f"{len(there)} objects and no {CACHE_MANIFEST}" if there else "nothing"
    return f"{url} is not a cache: there is {what}; name a URL that {sent_with(url)} wrote"


def _check_complete(url: str, parts: Sequence[RemotePart], there: Mapping[str, int]) -> None:
    for part in parts:
        names = [name for index in range(part.num_shards) for name in (part.shard(index), part.marker(index))]
        missing = [name for name in names if name not in there]
        if missing:
            raise CacheError(
                f"{url}: {len(missing)} objects are missing ({', '.join(missing[:3])}); send the "
                f"cache there again with {sent_with(url)}"
            )
