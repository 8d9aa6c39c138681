"""`lightopd pull`: a cache in a bucket as the same cache on disk, every shard checked as it comes."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from lightopd.cache.buckets.layout import is_small, manifest_of
from lightopd.cache.buckets.remote import RemotePart, parsed_marker, remote_parts
from lightopd.cache.buckets.shard_cache import HEADS
from lightopd.cache.buckets.stores.at_once import at_once
from lightopd.cache.buckets.stores.object_reader import ObjectReader, sent_with
from lightopd.cache.buckets.stores.opened import opened
from lightopd.cache.manifests import PULLING, read_manifest
from lightopd.cache.shards import marker_path, read_marker, shard_path, valid_shard
from lightopd.cache.store import open_cache
from lightopd.errors import CacheError, OutputError
from lightopd.files import file_sha256, write_atomically
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.shared.run_folder import LOCK, writing
from lightopd.schemas.manifest import CACHE_MANIFEST, CacheManifest
from lightopd.schemas.stores.buckets import BucketConfig


def pull(url: str, cache: Path, config: BucketConfig, signals: Sequence[str] | None = None) -> Report:
    """Fetch a cache from a URL into a folder; what is there and whole is not fetched again.

    Args:
        url: where from.
        cache: the folder; made where it is missing.
        config: how.
        signals: the signals that come along; None fetches all that are whole there.

    Raises:
        CacheError: no whole cache is at the URL, or an object is not the one its marker speaks of.
        OutputError: the folder holds something else, or cannot be written.
        InputError: the store cannot be read.
        ConfigError: a URL or an option that no store takes.
    """
    started_s = time.monotonic()
    reader = opened(url, config)
    there = reader.sizes()
    parts, unfinished = remote_parts(reader, there, signals)
    _refuse_another(cache, parts[0])
    with writing(cache):
        if not (cache / CACHE_MANIFEST).exists():
            write_atomically(cache / PULLING, f"{reader.url}\n".encode())
        fetched = _fetch_shards(reader, cache, parts)
        for name in there:
            if str(PurePosixPath(name).parent) == HEADS:
                _fetch_head(reader, cache, name, there[name])
        _fetch_small(reader, cache, parts, there)
        for part in reversed(parts):
            write_atomically(cache / manifest_of(part.folder), part.manifest)
        (cache / PULLING).unlink(missing_ok=True)
        names = [PurePosixPath(part.folder).name for part in parts if part.folder.startswith("signals/")]
        open_cache(cache, signals=names)
    seconds = time.monotonic() - started_s
    new = [size for size in fetched if size is not None]
    figures = {
        "parts": len(parts),
        "shards_fetched": len(new),
        "shards_there_already": len(fetched) - len(new),
        "bytes_fetched": sum(new),
        "mb_per_s": round(sum(new) / 1e6 / max(seconds, 1e-9), 3),
    }
    notes = tuple(f"{folder} is half pushed at {reader.url} and was left out" for folder in unfinished)
    return Report("pull", str(cache), dict(figures), notes=notes, seconds=seconds)


def _refuse_another(cache: Path, rollouts: RemotePart) -> None:
    """Refuse a folder that holds another cache, or anything that was not pulled."""
    if (cache / CACHE_MANIFEST).exists():
        if read_manifest(cache / CACHE_MANIFEST, CacheManifest).fingerprint() != rollouts.fingerprint:
            raise OutputError(f"{cache} holds another cache than the URL; name another folder")
    elif cache.is_dir() and not (cache / PULLING).exists():
        begun = {LOCK, f".{PULLING}.tmp"}  # all that a pull leaves that was killed before it said so
        if any(path.name not in begun for path in cache.iterdir()):
            raise OutputError(f"{cache} is not empty and not a cache; name another folder")


def _fetch_shards(reader: ObjectReader, cache: Path, parts: Sequence[RemotePart]) -> list[int | None]:
    """Bytes of every shard that was fetched; None for one that was there."""
    shards = [(part, index) for part in parts for index in range(part.num_shards)]
    progress = StageProgress("pull", None, "shards", len(shards))
    fetched = []
    for size in at_once(reader.config.jobs, lambda shard: _fetch(reader, cache, *shard), shards):
        fetched.append(size)
        progress.advance(is_own=size is not None)
    return fetched


def _fetch(reader: ObjectReader, cache: Path, part: RemotePart, index: int) -> int | None:
    content = reader.read(part.marker(index))
    marker, folder = parsed_marker(content, part, index, reader.url), cache / part.folder
    own = read_marker(folder, index)
    if own is not None and valid_shard(folder, index, part.fingerprint) is not None:
        if own.sha256 == marker.sha256:
            return None
        raise OutputError(
            f"{shard_path(folder, index)} has the settings of {reader.url} and other bytes; "
            "name another folder"
        )
    name = part.shard(index)
    reader.download(
        name,
        marker.size_bytes,
        shard_path(folder, index),
        lambda came: _refuse_other(reader, name, came, marker.sha256),
    )
    write_atomically(marker_path(folder, index), content or b"")
    return marker.size_bytes


def _fetch_head(reader: ObjectReader, cache: Path, name: str, size_bytes: int) -> None:
    path = cache / name
    if path.is_file() and file_sha256(path) == path.stem:
        return
    reader.download(name, size_bytes, path, lambda part: _refuse_other(reader, name, part, path.stem))


def _refuse_other(reader: ObjectReader, name: str, came: Path, wanted: str) -> None:
    found = file_sha256(came)
    if found != wanted:
        raise CacheError(
            f"{reader.url}/{name} has SHA-256 {found[:12]}, not {wanted[:12]}; delete the object and send "
            f"the cache there again with {sent_with(reader.url)}"
        )


def _fetch_small(
    reader: ObjectReader, cache: Path, parts: Sequence[RemotePart], there: Mapping[str, int]
) -> None:
    folders = {".", *(part.folder for part in parts)}
    manifests = {manifest_of(part.folder) for part in parts}
    wanted = [
        name
        for name in there
        if is_small(name) and str(PurePosixPath(name).parent) in folders and name not in manifests
    ]

    def fetch(name: str) -> None:
        reader.fetch(name, there[name], cache / name)

    for _ in at_once(reader.config.jobs, fetch, wanted):
        pass
