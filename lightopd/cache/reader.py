"""The training path: a shard as flat numpy columns, with checksums verified and no object per token.

R = rollouts in a shard, P = their prompt tokens, N = their response tokens, C = top-k entries of all
positions; nats throughout. Offsets are int64, start at 0 and have one entry more than what they cut.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightopd.cache.shards import shard_path
from lightopd.cache.store import Cache, rollouts_folder, signal_folder
from lightopd.cache.tables import flat_column
from lightopd.errors import CacheError
from lightopd.schemas.cache import ROLLOUTS, SIGNALS
from lightopd.schemas.records import Bools, Floats, Ids

Offsets = NDArray[np.int64]

ROLLOUT_COLUMNS = (
    "rollout_id",
    "prompt_id",
    "origin",
    "domain",
    "prompt_ids",
    "response_ids",
    "loss_mask",
    "turns",
    "logprobs",
    "entropies",
    "truncated",
    "reward",
)
TOPK_COLUMNS = ("topk_counts", "topk_ids", "topk_logprobs")


@dataclass(frozen=True, slots=True)
class SignalColumns:
    """One signal over a shard; the four top-k columns are None where only the sampled token was asked for."""

    logprobs_N: Floats
    tail_logprobs_N: Floats | None
    """Log of the probability outside the top-k; -inf when nothing is outside."""
    topk_offsets: Offsets | None
    """[N + 1], where each position's entries begin."""
    topk_ids_C: Ids | None
    """Most likely first within a position."""
    topk_logprobs_C: Floats | None
    """float32; rounded to float16 values where the signal was written so."""


@dataclass(frozen=True, slots=True)
class ShardColumns:
    """A shard of rollouts and the signals that were asked for; arrays may be read-only."""

    rollout_ids: tuple[str, ...]
    prompt_ids_by_user: tuple[str, ...]
    """The users' prompt ids, R long; rollouts of one prompt share one."""
    origins: tuple[str, ...]
    """Who wrote each response."""
    domains: tuple[str | None, ...]
    prompt_offsets: Offsets
    prompt_ids_P: Ids
    offsets: Offsets
    """[R + 1], cuts every column that ends in N."""
    response_ids_N: Ids
    loss_mask_N: Bools
    turns_N: Ids
    logprobs_N: Floats | None
    """Student at rollout; None for an imported cache."""
    entropies_N: Floats | None
    rewards_R: Floats
    """NaN where there is none."""
    is_truncated_R: Bools
    signals: dict[str, SignalColumns]


def read_shard_columns(
    cache: Cache,
    shard: int,
    signals: Sequence[str] = (),
    topk: Collection[str] | None = None,
    contents: Mapping[Path, pa.Buffer] | None = None,
) -> ShardColumns:
    """Read one shard of rollouts and signals for training.

    Args:
        cache: an opened cache that has the shard and the signals.
        shard: its number.
        signals: names of the signals to read.
        topk: those whose top-k and tail are wanted as well; None means all of `signals`.
        contents: of the shard's files, where a caller has read and checked them; None reads the files.

    Raises:
        CacheError: a file is missing or damaged, a signal is not aligned with the rollouts, or lengths
            disagree; the message names file and row.
    """
    path = shard_path(rollouts_folder(cache.path), shard)
    contents = {} if contents is None else contents
    table = read_columns(path, ROLLOUTS, ROLLOUT_COLUMNS, contents.get(path))
    offsets, tokens = _token_columns(path, table)
    prompts, prompt_offsets = flat_column(table.column("prompt_ids"))
    wanted = set(signals if topk is None else topk)
    ids = table.column("rollout_id")
    return ShardColumns(
        rollout_ids=tuple(ids.to_pylist()),
        prompt_ids_by_user=tuple(table.column("prompt_id").to_pylist()),
        origins=tuple(table.column("origin").to_pylist()),
        domains=tuple(table.column("domain").to_pylist()),
        prompt_offsets=prompt_offsets,
        prompt_ids_P=prompts,
        offsets=offsets,
        response_ids_N=tokens["response_ids"],
        loss_mask_N=tokens["loss_mask"],
        turns_N=tokens["turns"],
        logprobs_N=tokens["logprobs"],
        entropies_N=tokens["entropies"],
        rewards_R=table.column("reward").to_numpy().astype(np.float32),
        is_truncated_R=table.column("truncated").to_numpy().astype(np.bool_),
        signals={
            name: _signal_columns(cache, name, shard, ids, offsets, name in wanted, contents)
            for name in signals
        },
    )


def read_columns(
    path: Path, schema: pa.Schema, columns: Sequence[str], content: pa.Buffer | None = None
) -> pa.Table:
    """Some columns of a shard's file, page checksums verified, after its schema was compared.

    Args:
        path: of the file.
        schema: that it must have.
        columns: to read.
        content: the file's bytes, whose SHA-256 has been compared, so that pages are not checked again; None
            reads the file.

    Raises:
        CacheError: the file is missing, damaged, or has another schema.
    """
    try:
        source = path if content is None else pa.BufferReader(content)
        with pq.ParquetFile(source, page_checksum_verification=content is None) as file:
            found = file.schema_arrow
            if not found.equals(schema):
                raise CacheError(f"{path} has other columns than {_first_difference(found, schema)}")
            return file.read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise CacheError(
            f"{path} cannot be read ({reason}); copy the file again from where it was made, "
            "or delete it with its marker and run the stage that made it again"
        ) from error


def check_offsets(path: Path, name: str, found: Offsets, wanted: Offsets) -> None:
    """Refuse a list column whose rows are not as long as they must be, naming file and row."""
    if np.array_equal(found, wanted):
        return
    if len(found) != len(wanted):
        raise CacheError(
            f"{path} has {len(found) - 1} rows, {len(wanted) - 1} are needed; run `lightopd verify`"
        )
    row = int((np.diff(found) != np.diff(wanted)).argmax())
    raise CacheError(
        f"{path} row {row}: {name} has {np.diff(found)[row]} values, {np.diff(wanted)[row]} are needed; "
        "the shard is damaged: delete it with its marker and run the stage that made it again"
    )


def _token_columns(path: Path, table: pa.Table) -> tuple[Offsets, dict[str, Any]]:
    """Columns with one value for each response token, and their common offsets."""
    ids, offsets = flat_column(table.column("response_ids"))
    tokens: dict[str, Any] = {"response_ids": ids}
    for name in ("loss_mask", "turns", "logprobs", "entropies"):
        column = table.column(name)
        if table.num_rows and column.null_count == table.num_rows:
            tokens[name] = None
            continue
        tokens[name], found = flat_column(column)
        check_offsets(path, name, found, offsets)
    return offsets, tokens


def _signal_columns(
    cache: Cache,
    name: str,
    shard: int,
    rollout_ids: pa.ChunkedArray,
    offsets: Offsets,
    with_topk: bool,
    contents: Mapping[Path, pa.Buffer],
) -> SignalColumns:
    if name not in cache.signals:
        there = ", ".join(cache.signals) or "none"
        raise CacheError(f"{cache.path} has no signal {name!r} loaded (loaded: {there})")
    path = shard_path(signal_folder(cache.path, name), shard)
    columns = ["rollout_id", "logprobs", *((*TOPK_COLUMNS, "tail_logprobs") if with_topk else ())]
    table = read_columns(path, SIGNALS, columns, contents.get(path))
    check_rollout_ids(path, table.column("rollout_id"), rollout_ids)
    logprobs, found = flat_column(table.column("logprobs"))
    check_offsets(path, "logprobs", found, offsets)
    if not with_topk:
        return SignalColumns(logprobs, None, None, None, None)
    tails, found = flat_column(table.column("tail_logprobs"))
    check_offsets(path, "tail_logprobs", found, offsets)
    return SignalColumns(logprobs, tails, *topk_columns(path, table, offsets))


def check_rollout_ids(path: Path, found: pa.ChunkedArray, wanted: pa.ChunkedArray) -> None:
    """Refuse a signal whose row i does not speak of the rollouts' row i."""
    if found.equals(wanted):
        return
    if len(found) != len(wanted):
        raise CacheError(f"{path} has {len(found)} rows, its rollouts have {len(wanted)}; score them again")
    pairs = zip(found.to_pylist(), wanted.to_pylist(), strict=True)
    row, (own, other) = next((row, pair) for row, pair in enumerate(pairs) if pair[0] != pair[1])
    raise CacheError(
        f"{path} row {row}: speaks of rollout {own}, the rollouts have {other}; score them again"
    )


def topk_columns(path: Path, table: pa.Table, offsets: Offsets) -> tuple[Offsets, Ids, Floats]:
    """Offsets [N + 1] of the positions, ids [C] and log-probabilities [C] of a signal's top-k."""
    counts, found = flat_column(table.column("topk_counts"))
    check_offsets(path, "topk_counts", found, offsets)
    topk_offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=topk_offsets[1:])
    ids, found_ids = flat_column(table.column("topk_ids"))
    check_offsets(path, "topk_ids", found_ids, topk_offsets[offsets])
    logprobs, found_logprobs = flat_column(table.column("topk_logprobs"))
    check_offsets(path, "topk_logprobs", found_logprobs, topk_offsets[offsets])
    return topk_offsets, ids, logprobs


def _first_difference(found: pa.Schema, wanted: pa.Schema) -> str:
    for field in wanted:
        if field.name not in found.names:
            return f"a cache has: {field.name} is missing"
        own = found.field(field.name)
        if not own.equals(field):
            return f"a cache has: {field.name} is {own.type}, not {field.type}"
    return f"a cache has: {', '.join(sorted(set(found.names) - set(wanted.names))) or 'the order differs'}"
