"""`lightopd push`: a cache on disk as the same cache in a bucket; what is there already is not sent again."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightopd.cache.buckets.layout import RECORD, Part, heads_of, parts_of, rollouts_of, small_files
from lightopd.cache.buckets.mirrors import when_here
from lightopd.cache.buckets.remote import remote_fingerprint
from lightopd.cache.buckets.stores.at_once import at_once
from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.shards import AGAIN, marker_of
from lightopd.cache.store import Cache, open_cache
from lightopd.errors import CacheError, OutputError
from lightopd.files import file_sha256, looks_like_url
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.reports import Report
from lightopd.schemas.manifest import ShardMarker
from lightopd.schemas.stores.buckets import BucketConfig


@dataclass(frozen=True, slots=True)
class _Sent:
    """What became of a shard."""

    shards: int = 0
    size_bytes: int = 0
    there: int = 0

    def plus(self, other: "_Sent") -> "_Sent":
        return _Sent(self.shards + other.shards, self.size_bytes + other.size_bytes, self.there + other.there)


def push(cache: Path, url: str, config: BucketConfig, signals: Sequence[str] | None = None) -> Report:
    """Send a whole cache to a URL; several processes may send the same one, and a later one resumes.

    Args:
        cache: the folder.
        url: where to.
        config: how.
        signals: the signals that go along; None sends all.

    Raises:
        CacheError: the cache is not whole, or a file is not the one its marker speaks of.
        OutputError: another cache lies at the URL, or the store cannot be written.
        InputError: the store cannot be read.
        ConfigError: a URL or an option that no store takes.
    """
    started_s = time.monotonic()
    if source := looks_like_url(cache):
        raise CacheError(f"{source} is a URL, and a folder is sent: `lightopd pull {source} CACHE` first")
    opened = open_cache(cache, signals=signals)
    parts = parts_of(opened)
    bucket = Bucket(url, config, is_made=True)
    there = bucket.sizes()
    sent = _send_shards(bucket, cache, parts, there)
    for name in heads_of(cache):
        _send_head(bucket, cache, name, there)
    _send_small(bucket, cache, parts, there)
    for part in reversed(parts):  # the cache's own manifest is the last object of all
        _finish(bucket, cache, part)
    _check_sizes(bucket, parts)
    return _report(url, sent, len(parts), time.monotonic() - started_s)


def push_rollouts(source: Cache, url: str) -> None:
    """Send the rollouts of a cache, which may be at another URL, without its signals; a later call resumes.

    Raises:
        CacheError: a shard is not the one its marker speaks of.
        OutputError: another cache lies at the URL, or the store cannot be written.
        InputError: a store cannot be read.
    """
    bucket, part = Bucket(url, is_made=True), rollouts_of(source)
    _send_shards(bucket, source.path, [part], bucket.sizes())
    _finish(bucket, source.path, part)


def _send_shards(bucket: Bucket, cache: Path, parts: Sequence[Part], there: Mapping[str, int]) -> _Sent:
    """Send the shards that are not there, each part's after the record that says whose it is."""
    for part in parts:
        _begin(bucket, part, there)
    total = sum(len(part.markers) for part in parts)
    progress, sent = StageProgress("push", None, "shards", total), _Sent()

    def send(shard: tuple[Part, int]) -> tuple[_Sent, int]:
        part, index = shard
        return _send(bucket, cache, part, index, there), part.markers[index].tokens

    shards = [(part, index) for part in parts for index in range(len(part.markers))]
    for one, tokens in at_once(bucket.config.jobs, send, shards):
        sent = sent.plus(one)
        progress.advance(tokens, is_own=bool(one.shards))
    return sent


def _begin(bucket: Bucket, part: Part, there: Mapping[str, int]) -> None:
    """Say whose part this is going to be, unless another one's is there."""
    record = f"{part.folder}/{RECORD}"
    if record not in there and part.manifest in there:  # brought there by another tool
        if remote_fingerprint(bucket, part.folder) != part.fingerprint:
            raise _taken(bucket, part, "a cache of other settings")
        _refuse_other_shards(bucket, part, there)
    if not bucket.put_if_absent(record, part.record()):
        raise _taken(bucket, part, "another cache, whole or half pushed")


def _refuse_other_shards(bucket: Bucket, part: Part, there: Mapping[str, int]) -> None:
    def differs(index: int) -> bool:
        name = part.marker(index)
        return name in there and not _is_of(bucket.read(name), part.markers[index])

    if any(at_once(bucket.config.jobs, differs, range(len(part.markers)))):
        raise _taken(bucket, part, "a cache of the same settings with other bytes")


def _taken(bucket: Bucket, part: Part, what: str) -> OutputError:
    return OutputError(
        f"{bucket.url}/{part.folder} belongs to {what}; name another URL, or delete what is there with your "
        "store's own tool"
    )


def _send(bucket: Bucket, cache: Path, part: Part, index: int, there: Mapping[str, int]) -> _Sent:
    marker, shard = part.markers[index], part.shard(index)
    is_listed = part.marker(index) in there and there.get(shard) == marker.size_bytes
    if is_listed and _is_of(bucket.read(part.marker(index)), marker):
        return _Sent(there=1)
    file = cache / shard
    with when_here(file, marker.sha256, lambda: file.open("rb")) as content:
        if hashlib.file_digest(content, "sha256").hexdigest() != marker.sha256:
            raise CacheError(f"{file} does not have the SHA-256 in its marker; {AGAIN}")
        bucket.put(shard, content)
    bucket.put(part.marker(index), (cache / part.marker(index)).read_bytes())
    return _Sent(shards=1, size_bytes=marker.size_bytes)


def _is_of(content: bytes | None, marker: ShardMarker) -> bool:
    """Whether a marker at the URL speaks of this shard's bytes."""
    found = None if content is None else marker_of(content)
    return found is not None and found.sha256 == marker.sha256


def _send_small(bucket: Bucket, cache: Path, parts: Sequence[Part], there: Mapping[str, int]) -> None:
    def send(name: str) -> None:
        content = (cache / name).read_bytes()
        if there.get(name) != len(content) or bucket.read(name) != content:
            bucket.put(name, content)

    for _ in at_once(bucket.config.jobs, send, small_files(cache, [part.folder for part in parts])):
        pass


def _send_head(bucket: Bucket, cache: Path, name: str, there: Mapping[str, int]) -> None:
    file = cache / name
    if there.get(name) == file.stat().st_size:
        return
    if file_sha256(file) != file.stem:
        raise CacheError(f"{file} is not the head that its name says; {AGAIN}")
    with file.open("rb") as content:
        bucket.put(name, content)


def _finish(bucket: Bucket, cache: Path, part: Part) -> None:
    content = (cache / part.manifest).read_bytes()
    if not bucket.put_if_absent(part.manifest, content):
        bucket.put(part.manifest, content)  # of the same settings: what stands beside them is kept up


def _check_sizes(bucket: Bucket, parts: Sequence[Part]) -> None:
    there = bucket.sizes()
    for part in parts:
        for index, marker in enumerate(part.markers):
            found = there.get(part.shard(index))
            if found != marker.size_bytes:
                raise OutputError(
                    f"{bucket.url}/{part.shard(index)} has {found} bytes after it was sent, not "
                    f"{marker.size_bytes}; something else writes there; stop it, then push again"
                )


def _report(url: str, sent: _Sent, parts: int, seconds: float) -> Report:
    rate = sent.size_bytes / 1e6 / max(seconds, 1e-9)
    figures = {
        "parts": parts,
        "shards_sent": sent.shards,
        "shards_there_already": sent.there,
        "bytes_sent": sent.size_bytes,
        "mb_per_s": round(rate, 3),
    }
    return replace(Report("push", url, dict(figures)), seconds=seconds)
