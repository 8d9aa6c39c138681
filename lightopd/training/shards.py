"""The cache as the trainer reads it: checked once, indexed, and held in bounded memory."""

# P = trainable rollouts of the cache, S = shards

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns, read_columns, read_shard_columns
from lightopd.cache.shards import file_sha256, shard_path
from lightopd.cache.store import Cache, rollouts_folder, signal_folder
from lightopd.cache.tables import flat_column
from lightopd.errors import CacheError
from lightopd.objectives.prepare import Prepared
from lightopd.objectives.views import group_number
from lightopd.schemas.cache import ROLLOUTS
from lightopd.schemas.manifest import ShardMarker
from lightopd.training.plan import CacheIndex

Stamps = dict[Path, tuple[int, int]]
"""Size in bytes and time of last change in nanoseconds, by file."""

ROLLOUT_BYTES = 512
"""Generous share of a rollout's strings and per-rollout values in memory."""


def check_shards(cache: Cache, signals: Sequence[str]) -> Stamps:
    """Compare every shard that will be read with the SHA-256 in its marker, and note its stamp.

    Raises:
        CacheError: a shard is missing or its bytes are not those that its marker speaks of.
    """
    stamps: Stamps = {}
    for path, marker in _files(cache, signals):
        try:
            stamps[path] = _stamp(path)
            found = file_sha256(path)
        except OSError as error:
            raise CacheError(f"{path} cannot be read ({error.strerror}); copy the cache again") from error
        if found != marker.sha256:
            raise CacheError(
                f"{path} has SHA-256 {found[:12]}, its marker says {marker.sha256[:12]}; copy the file again "
                "from where it was made, or delete it with its marker and run the stage that made it again"
            )
    return stamps


def index_cache(
    cache: Cache, signals: Sequence[str], topk: Sequence[str], prepared: Prepared | None = None
) -> CacheIndex:
    """Read where every trainable rollout lies and how long it is.

    Args:
        cache: complete.
        signals: names of the signals that will be read.
        topk: those whose top-k will be read as well.
        prepared: which rollouts the objective selects, and its columns; None for all, without columns.

    Raises:
        CacheError: a rollout has an empty prompt; the message names file and row.
    """
    parts = [_index_shard(cache, shard) for shard in cache.shards]
    shard_P, row_P, prompts_P, responses_P, trained_P, groups_P = (
        np.concatenate([part[column] for part in parts]) if parts else np.zeros(0, np.int32)
        for column in range(6)
    )
    has_tokens_P = trained_P > 0
    is_kept_P = has_tokens_P if prepared is None else has_tokens_P & prepared.keep_R
    per_token = _bytes_per_token(cache, signals, topk)
    bytes_S = np.zeros(max(cache.shards, default=-1) + 1, dtype=np.int64)
    np.add.at(bytes_S, shard_P, 4 * prompts_P + per_token * responses_P.astype(np.int64) + ROLLOUT_BYTES)
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
    _held: "OrderedDict[int, ShardColumns]" = field(default_factory=OrderedDict)

    def shard(self, number: int) -> ShardColumns:
        """A shard's columns, from memory or from disk.

        Raises:
            CacheError: the file has changed since training began, or is damaged.
        """
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        self._check_unchanged(number)
        while self._held and self._held_bytes() + self.bytes_S[number] > self.limit_bytes:
            self._held.popitem(last=False)
        self._held[number] = read_shard_columns(self.cache, number, self.signals, topk=self.topk)
        return self._held[number]

    def _held_bytes(self) -> int:
        return int(sum(self.bytes_S[number] for number in self._held))

    def _check_unchanged(self, number: int) -> None:
        folders = [rollouts_folder(self.cache.path)]
        folders += [signal_folder(self.cache.path, name) for name in self.signals]
        for path in (shard_path(folder, number) for folder in folders):
            found = _stamp(path) if path.exists() else None
            if found != self.stamps[path]:
                raise CacheError(
                    f"{path} has changed or is gone since training began; restore it, run `lightopd verify "
                    f"{self.cache.path}`, and start again from the last checkpoint"
                )


def _files(cache: Cache, signals: Sequence[str]) -> list[tuple[Path, ShardMarker]]:
    folders = [(rollouts_folder(cache.path), cache.shards, cache.markers)]
    folders += [
        (signal_folder(cache.path, name), cache.signals[name].shards, cache.signals[name].markers)
        for name in signals
    ]
    return [
        (shard_path(folder, shard), marker)
        for folder, shards, markers in folders
        for shard, marker in zip(shards, markers, strict=True)
    ]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _index_shard(cache: Cache, shard: int) -> tuple[NDArray[Any], ...]:
    path = shard_path(rollouts_folder(cache.path), shard)
    table = read_columns(path, ROLLOUTS, ("prompt_id", "prompt_ids", "response_ids", "loss_mask"))
    _, prompt_offsets = flat_column(table.column("prompt_ids"))
    _, offsets = flat_column(table.column("response_ids"))
    mask_N, _ = flat_column(table.column("loss_mask"))
    trained = np.diff(np.concatenate([[0], np.cumsum(mask_N, dtype=np.int64)])[offsets])
    prompts = np.diff(prompt_offsets)
    if (prompts == 0).any():
        raise CacheError(
            f"{path} row {int((prompts == 0).argmax())}: the prompt is empty, so nothing predicts the first "
            "response token; roll out again with prompts of at least one token"
        )
    rows = np.arange(table.num_rows)
    columns = (np.full(table.num_rows, shard), rows, prompts, np.diff(offsets), trained)
    groups = [group_number(prompt) for prompt in table.column("prompt_id").to_pylist()]
    return *(column.astype(np.int32) for column in columns), np.array(groups, dtype=np.int64)


def _bytes_per_token(cache: Cache, signals: Sequence[str], topk: Sequence[str]) -> int:
    """Bytes of a response token in `ShardColumns`, had every position its full top-k."""
    rollout = 4 + 1 + 4 + 4 + 4
    tails = 4 + 8
    wide: list[int] = [tails + 8 * cache.signals[name].manifest.top_k for name in topk]
    return rollout + 4 * len(signals) + sum(wide)
