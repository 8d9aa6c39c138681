"""The cache as the trainer reads it: checked once, indexed, and held in bounded memory."""

# P = trainable rollouts of the cache, S = shards, R = rollouts of one shard

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightopd.cache.buckets.mirrors import Stamp, is_away, stamp_here, stamp_of
from lightopd.cache.contexts import read_texts
from lightopd.cache.reader import ShardColumns, read_shard_columns
from lightopd.cache.shards import read_content
from lightopd.cache.signals.channels import BYTES
from lightopd.cache.signals.horizon import horizons_of
from lightopd.cache.signals.trained_part import trained_part
from lightopd.cache.store import Cache
from lightopd.cache.tables import flat_column
from lightopd.errors import CacheError
from lightopd.objectives.preparation.prepare import PreparedRollouts
from lightopd.schemas.manifest import ShardMarker
from lightopd.training.data.plan import CacheIndex

Stamps = dict[Path, Stamp]

Files = dict[Path, tuple[pa.Buffer, Stamp]]
"""Bytes of a shard's files."""

IndexPart = tuple[NDArray[Any], ...]
"""Of one shard, [R] each: shard, row, prompt tokens, response tokens, trained tokens, group."""

Read = tuple[Sequence[str], Sequence[str], Sequence[str]]
"""Signals that are read, those whose top-k is read as well, and those whose hidden states are."""

ROLLOUT_BYTES = 512
"""Generous share of a rollout's strings and per-rollout values in memory."""


def index_cache(
    cache: Cache,
    signals: Sequence[str],
    topk: Sequence[str],
    prepared: PreparedRollouts | None = None,
    parts: Sequence[IndexPart] | None = None,
    hidden: Sequence[str] = (),
) -> CacheIndex:
    """Find out where every trainable rollout lies and how long it is.

    Args:
        cache: complete.
        signals: names of the signals that will be read.
        topk: those whose top-k will be read as well.
        prepared: which rollouts the objective selects, and its columns; None for all, without columns.
        parts: of all shards, in order, from `index_shard`; None reads the rollouts for them.
        hidden: signals whose hidden states will be read.

    Raises:
        CacheError: a row is not what it must be; the message names file and row.
    """
    if parts is None:
        seen: set[str] = set()
        horizons = horizons_of(cache, signals)
        shards = ((n, read_shard_columns(cache, n, seen=seen)) for n in cache.shards)
        parts = [index_shard(n, trained_part(columns, horizons)) for n, columns in shards]
    shard_P, row_P, prompts_P, responses_P, trained_P, groups_P = (
        np.concatenate([part[column] for part in parts]) if parts else np.zeros(0, np.int32)
        for column in range(6)
    )
    has_tokens_P = trained_P > 0
    is_kept_P = has_tokens_P if prepared is None else has_tokens_P & prepared.keep_R
    bytes_S = np.zeros(max(cache.shards, default=-1) + 1, dtype=np.int64)
    np.add.at(bytes_S, shard_P, _bytes_of(cache, (signals, topk, hidden), prompts_P, responses_P))
    return CacheIndex(
        shard_P=shard_P[is_kept_P],
        row_P=row_P[is_kept_P],
        prompts_P=prompts_P[is_kept_P],
        responses_P=responses_P[is_kept_P],
        trained_P=trained_P[is_kept_P],
        groups_P=groups_P[is_kept_P].astype(np.int64),
        bytes_S=bytes_S,
        num_left_out=int((~has_tokens_P).sum()),
        columns={} if prepared is None else {n: c[is_kept_P] for n, c in prepared.columns.items()},
    )


def index_shard(shard: int, columns: ShardColumns) -> IndexPart:
    """A shard's part of the index."""
    prompts_R = np.diff(columns.prompt_offsets)
    trained_R = np.diff(
        np.concatenate([[0], np.cumsum(columns.loss_mask_N, dtype=np.int64)])[columns.offsets]
    )
    rows_R = np.arange(len(prompts_R))
    counts = (np.full(len(rows_R), shard), rows_R, prompts_R, np.diff(columns.offsets), trained_R)
    return *(count_R.astype(np.int32) for count_R in counts), columns.groups_R


@dataclass(slots=True)
class FirstReading:
    """Every shard once, before the first step; all stay in memory where the whole cache fits.

    Iterating gives the shards in order. The bytes that are decoded are those whose SHA-256 was compared.
    """

    cache: Cache
    """Complete."""
    signals: tuple[str, ...]
    topk: tuple[str, ...]
    """Signals whose top-k is read as well."""
    limit_bytes: int
    """Most bytes held."""
    shown: str | None = None
    """Text column whose prompts take the place of the rollouts' own."""
    hidden: tuple[str, ...] = ()
    """Signals whose hidden states are read as well."""
    stamps: Stamps = field(default_factory=dict)
    """Of the files as they were read."""
    parts: list[IndexPart] = field(default_factory=list)
    """Of the index, complete after the reading."""
    _held: "OrderedDict[int, ShardColumns]" = field(default_factory=OrderedDict)
    _seen: set[str] = field(default_factory=set)
    """Rollout ids so far."""

    def __iter__(self) -> Iterator[ShardColumns]:
        """Read the shards.

        Raises:
            CacheError: a file is missing or not the one that its marker speaks of, or a row is broken.
        """
        size_bytes = 0
        for shard, files in _read_ahead(self.cache, self.signals):
            self.stamps |= {path: stamp for path, (_, stamp) in files.items()}
            contents = {path: content for path, (content, _) in files.items()}
            columns = read_shard_columns(
                self.cache,
                shard,
                self.signals,
                topk=self.topk,
                contents=contents,
                seen=self._seen,
                hidden=self.hidden,
            )
            columns = trained_part(columns, horizons_of(self.cache, self.signals))
            columns = under_prompts(self.cache, shard, columns, self.shown)
            part = index_shard(shard, columns)
            self.parts.append(part)
            read = (self.signals, self.topk, self.hidden)
            size_bytes += int(_bytes_of(self.cache, read, part[2], part[3]).sum())
            if size_bytes > self.limit_bytes:
                self._held.clear()
            else:
                self._held[shard] = columns
            yield columns

    def store(self, index: CacheIndex) -> "ShardStore":
        """The shards for training, after the reading."""
        place = (self.cache, self.signals, self.topk, self.stamps, index.bytes_S, self.limit_bytes)
        return ShardStore(*place, self.shown, self.hidden, self._held)


@dataclass(slots=True)
class ShardStore:
    """Decoded shards, the most recently used ones, within a limit of memory."""

    cache: Cache
    signals: tuple[str, ...]
    topk: tuple[str, ...]
    """Signals whose top-k is read as well."""
    stamps: Stamps
    """Of the files when they were checked."""
    bytes_S: NDArray[np.int64]
    """Size that a shard counts with."""
    limit_bytes: int
    """Most bytes held; a single shard may be larger."""
    shown: str | None = None
    """Text column whose prompts take the place of the rollouts' own."""
    hidden: tuple[str, ...] = ()
    """Signals whose hidden states are read as well."""
    _held: "OrderedDict[int, ShardColumns]" = field(default_factory=OrderedDict)

    def shard(self, number: int) -> ShardColumns:
        """A shard's columns, from memory or from disk.

        Raises:
            CacheError: the file has changed since training began, or is damaged.
        """
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        while self._held and self._held_bytes() + self.bytes_S[number] > self.limit_bytes:
            self._held.popitem(last=False)
        columns = _read_unchanged(self.cache, number, (self.signals, self.topk, self.hidden), self.stamps)
        self._held[number] = under_prompts(self.cache, number, columns, self.shown)
        return self._held[number]

    def changed(self) -> list[Path]:
        """Files that are no longer those that were read before the first step."""
        kept = ((path, stamp) for path, stamp in self.stamps.items() if not is_away(path))
        return [path for path, stamp in kept if stamp_here(path) != stamp]

    def _held_bytes(self) -> int:
        return int(sum(self.bytes_S[number] for number in self._held))

    def __reduce__(self) -> tuple[Any, ...]:
        """A loader process that is not a fork gets no decoded shards sent; it reads its own."""
        return ShardStore, (
            self.cache,
            self.signals,
            self.topk,
            self.stamps,
            self.bytes_S,
            self.limit_bytes,
            self.shown,
            self.hidden,
        )


def under_prompts(cache: Cache, shard: int, columns: ShardColumns, shown: str | None) -> ShardColumns:
    """A shard's rollouts under what a text column's writer was shown; None: under their own prompts.

    Raises:
        CacheError: the text's shard is missing or damaged.
    """
    if shown is None:
        return columns
    prompts, offsets = flat_column(read_texts(cache, shown, shard).column("prompt_ids"))
    return replace(columns, prompt_ids_P=prompts, prompt_offsets=offsets)


def store_as_it_is(
    cache: Cache, signals: tuple[str, ...], bytes_S: NDArray[np.int64], limit_bytes: int
) -> ShardStore:
    """A store of the files as they lie there now, for looking; their SHA-256 is not compared."""
    stamps = {
        path: stamp_of(path, marker.sha256) or (0, 0)
        for shard in cache.shards
        for path, marker in _files_and_markers(cache, shard, signals)
    }
    hidden = tuple(name for name in signals if cache.signals[name].manifest.hidden is not None)
    return ShardStore(cache, signals, signals, stamps, bytes_S, limit_bytes, hidden=hidden)


def _read_unchanged(cache: Cache, shard: int, read: Read, stamps: Stamps) -> ShardColumns:
    signals, topk, hidden = read
    for path, marker in _files_and_markers(cache, shard, signals):
        if stamp_of(path, marker.sha256) != stamps[path]:
            raise CacheError(
                f"{path} has changed or is gone since training began; restore it, run `lightopd verify "
                f"{cache.path}`, and start again from the last checkpoint"
            )
    columns = read_shard_columns(cache, shard, signals, topk=topk, hidden=hidden)
    return trained_part(columns, horizons_of(cache, signals))


def _read_ahead(cache: Cache, signals: Sequence[str]) -> Iterator[tuple[int, Files]]:
    """Each shard and its files; while one is decoded, the next is read and checked."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        ahead: deque[tuple[int, Future[Files]]] = deque()
        for shard in cache.shards:
            ahead.append((shard, pool.submit(_checked_files, cache, shard, signals)))
            if len(ahead) > 1:
                before, files = ahead.popleft()
                yield before, files.result()
        for last, files in ahead:
            yield last, files.result()


def _checked_files(cache: Cache, shard: int, signals: Sequence[str]) -> Files:
    files = _files_and_markers(cache, shard, signals)
    return {path: _checked_content(path, marker) for path, marker in files}


def _checked_content(path: Path, marker: ShardMarker) -> tuple[pa.Buffer, Stamp]:
    """The bytes of a file that its marker speaks of, and the file's stamp."""
    stamp = stamp_of(path, marker.sha256) or (0, 0)
    return read_content(path, marker), stamp


def _files_and_markers(
    cache: Cache, shard: int, signals: Sequence[str]
) -> Iterator[tuple[Path, ShardMarker]]:
    """Of a shard: its rollouts, then its signals."""
    for name in (None, *signals):
        yield cache.file(shard, name), cache.marker(shard, name)


def _bytes_of(
    cache: Cache, read: Read, prompts_R: NDArray[np.integer], responses_R: NDArray[np.integer]
) -> NDArray[np.int64]:
    """What each rollout counts with in memory."""
    per_token = _bytes_per_token(cache, read)
    size_R: NDArray[np.int64] = 4 * prompts_R + per_token * responses_R.astype(np.int64) + ROLLOUT_BYTES
    return size_R


def _bytes_per_token(cache: Cache, read: Read) -> int:
    """Bytes of a response token in `ShardColumns`, had every position its full top-k."""
    signals, topk, hidden = read
    rollout = 4 + 1 + 4 + 4 + 4
    tails = 4 + 8
    wide: list[int] = [tails + 8 * cache.signals[name].manifest.top_k for name in topk]
    kept = [states for name in hidden if (states := cache.signals[name].manifest.hidden)]
    wide += [states.size * BYTES[states.format] + 4 for states in kept]
    return rollout + 4 * len(signals) + sum(wide)
