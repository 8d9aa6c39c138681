"""The one way to read a shard: its bytes are compared with the marker, and what it says with the manifest.

For training it becomes flat numpy columns, with no object per token.

R = rollouts in a shard, P = their prompt tokens, N = their response tokens, C = top-k entries of all
positions; nats throughout. Offsets are int64, start at 0 and have one entry more than what they cut.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightopd.cache.buckets.mirrors import bring
from lightopd.cache.manifests import signal_folder
from lightopd.cache.row_checks import refuse_faults, rollout_faults, score_faults
from lightopd.cache.shards import read_marker, read_table, shard_path
from lightopd.cache.signals.channels import HiddenColumns, hidden_columns, read_channels
from lightopd.cache.signals.hidden_checks import hidden_faults
from lightopd.cache.signals.horizon import scored_offsets, scored_tokens, spread
from lightopd.cache.store import Cache
from lightopd.cache.tables import flat_column
from lightopd.errors import CacheError
from lightopd.schemas.cache import HIDDEN_COLUMNS, ROLLOUTS, SIGNALS, TOKEN_COLUMNS
from lightopd.schemas.records import Bools, Floats, Ids

Offsets = NDArray[np.int64]

NOT_TRAINED_ON = ("answer", "prompt_text", "response_text")


@dataclass(frozen=True, slots=True)
class SignalColumns:
    """One signal over a shard; the four top-k columns are None where only the sampled token is wanted.

    Behind the signal's horizon log-probabilities are NaN, and there are no entries.
    """

    logprobs_N: Floats
    tail_logprobs_N: Floats | None
    """Log of the probability outside the top-k; -inf when nothing is outside."""
    topk_offsets: Offsets | None
    """[N + 1], where each position's entries begin."""
    topk_ids_C: Ids | None
    """Most likely first within a position."""
    topk_logprobs_C: Floats | None
    """float32; rounded to float16 values where the signal was written so."""
    hidden: HiddenColumns | None = None
    """Hidden states, as they are stored; None where they are not wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """What rollouts have for each response token, [N]: the columns `TOKEN_COLUMNS`, laid end to end."""

    response_ids_N: Ids
    loss_mask_N: Bools
    turns_N: Ids
    logprobs_N: Floats | None
    """Student at rollout; None for an imported cache."""
    entropies_N: Floats | None
    behavior_logprobs_N: Floats | None = None
    """Of who sampled, after temperature and truncation; the student's own where the cache does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardColumns(TokenColumns):
    """A shard of rollouts and the signals that were requested; arrays may be read-only."""

    rollout_ids: Sequence[str]
    prompt_ids_by_user: Sequence[str]
    """The users' prompt ids, R long; rollouts of one prompt share one."""
    groups_R: NDArray[np.int64]
    """Rollouts of one prompt share a number, unique over the cache."""
    origins: Sequence[str]
    """Who wrote each response: `student`, `teacher` or `imported`."""
    domains: Sequence[str | None]
    prompt_offsets: Offsets
    prompt_ids_P: Ids
    offsets: Offsets
    """[R + 1], cuts every column that ends in N."""
    rewards_R: Floats
    """NaN where there is none."""
    is_truncated_R: Bools
    signals: Mapping[str, SignalColumns]
    teacher_rewards_R: Floats | None = None
    """Mean reward of the teacher's own answers to the rollout's prompt, NaN where there is none."""
    text_values_R: Mapping[str, Floats] = field(default_factory=dict)
    """Numbers of text columns by name, NaN where there is none; those that were requested."""
    chunks_RM4: Mapping[str, Floats] = field(default_factory=dict)
    """Chunks of branches by text column, see `contexts.scored_chunks`; those that were requested."""


def read_shard_columns(
    cache: Cache,
    shard: int,
    signals: Sequence[str] = (),
    topk: Collection[str] | None = None,
    contents: Mapping[Path, pa.Buffer] | None = None,
    seen: set[str] | None = None,
    hidden: Collection[str] = (),
) -> ShardColumns:
    """Read one shard of rollouts and signals for training.

    Args:
        cache: an opened cache that has the shard and the signals.
        shard: its number.
        signals: names of the signals to read.
        topk: those whose top-k and tail are wanted as well; None means all of `signals`.
        contents: of the shard's files, where a caller has read and checked them; None reads the files.
        seen: rollout ids of the shards before, at a first reading, which checks every row and adds the
            shard's; None where that was done.
        hidden: those whose hidden states are wanted as well.

    Raises:
        CacheError: a file is missing or damaged, a row is not what it must be, or a signal is not aligned
            with the rollouts; the message names file and row.
    """
    path = cache.file(shard)
    contents = {} if contents is None else contents
    names = [name for name in ROLLOUTS.names if name not in NOT_TRAINED_ON]
    table = read_columns(cache, shard, names, content=contents.get(path))
    if seen is not None:
        refuse_faults(path, rollout_faults(table, cache.manifest, seen))
    tokens, offsets = _token_columns(path, table)
    prompts, prompt_offsets = flat_column(table.column("prompt_ids"))
    wanted = set(signals if topk is None else topk)
    ids, of_prompts = table.column("rollout_id"), table.column("prompt_id").to_pylist()
    return ShardColumns(
        rollout_ids=tuple(ids.to_pylist()),
        prompt_ids_by_user=tuple(of_prompts),
        groups_R=np.array([group_number(prompt) for prompt in of_prompts], np.int64),
        origins=tuple(table.column("origin").to_pylist()),
        domains=tuple(table.column("domain").to_pylist()),
        prompt_offsets=prompt_offsets,
        prompt_ids_P=prompts,
        offsets=offsets,
        rewards_R=table.column("reward").to_numpy().astype(np.float32),
        is_truncated_R=table.column("truncated").to_numpy().astype(np.bool_),
        signals={
            name: _with_hidden(
                _signal_columns(cache, name, shard, table, name in wanted, contents, seen is not None),
                _hidden_columns(cache, name, shard, table, contents) if name in hidden else None,
            )
            for name in signals
        },
        **tokens,
    )


@lru_cache(maxsize=4096)
def group_number(prompt_id: str) -> int:
    """A number for a prompt, the same everywhere: 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "little") >> 1


def largest_id(cache: Cache, shard: int) -> int:
    """The largest token id of a shard, among prompts, responses, and the top-k of the opened signals."""
    columns = [read_columns(cache, shard, [name])[name] for name in ("prompt_ids", "response_ids")]
    columns += [read_columns(cache, shard, ["topk_ids"], signal)["topk_ids"] for signal in cache.signals]
    return max(pc.max(pc.list_flatten(column)).as_py() or 0 for column in columns)


def rows_beyond(cache: Cache, shard: int, limit: int) -> NDArray[np.int64]:
    """Numbers of the rows of a shard that have a prompt or response id of `limit` or more."""
    columns = (read_columns(cache, shard, [name])[name] for name in ("prompt_ids", "response_ids"))
    found: list[int] = []
    for column in columns:
        whole = column.combine_chunks()
        is_beyond = pc.greater_equal(pc.list_flatten(whole), limit)
        found += pc.unique(pc.filter(pc.list_parent_indices(whole), is_beyond)).to_pylist()
    return np.unique(np.asarray(found, np.int64))


def read_columns(
    cache: Cache,
    shard: int,
    columns: Sequence[str],
    signal: str | None = None,
    content: pa.Buffer | None = None,
) -> pa.Table:
    """Some columns of a shard, of the rollouts or of a signal, after all that it says was compared.

    Args:
        cache: an opened cache that has the shard.
        shard: its number.
        columns: to read; one that is newer than the file is null.
        signal: name of a signal; None for the rollouts.
        content: the file's bytes, where a caller has compared them; None reads and compares them.

    Raises:
        CacheError: the file is missing, is not the one its marker speaks of, belongs elsewhere, or has other
            columns.
    """
    manifest = cache.manifest_of(signal)
    marker = cache.marker(shard, signal)
    return read_table(cache.file(shard, signal), manifest.kind, marker, columns, content)


def speaks_of(cache: Cache, signal: str, shard: int) -> bool:
    """Whether a signal's shard, which is whole, scored the rollouts that are there: ids hash their content.

    Rollouts that were made again may have come out others. A file that cannot be read speaks of none.
    """
    files = shard_path(signal_folder(cache.path, signal), shard), cache.file(shard)
    try:
        own, theirs = (_ids_in(file, shard) for file in files)
    except (OSError, pa.ArrowException, CacheError):
        return False
    return own == theirs


def _ids_in(file: Path, shard: int) -> list[str]:
    if (marker := read_marker(file.parent, shard)) is not None:
        bring(file, marker.sha256)
    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        names: list[str] = opened.read(["rollout_id"]).column(0).to_pylist()
    return names


def check_rollouts(cache: Cache) -> None:
    """Check every row of the rollouts, as a stage does before it pays for anything that builds on them.

    Raises:
        CacheError: a file is damaged, or a row is not what it must be; the message names file and row.
    """
    seen: set[str] = set()
    for shard in cache.shards:
        table = read_columns(cache, shard, ROLLOUTS.names)
        refuse_faults(cache.file(shard), rollout_faults(table, cache.manifest, seen))


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


def _token_columns(path: Path, table: pa.Table) -> tuple[dict[str, Any], Offsets]:
    """Columns with one value for each response token, and their common offsets."""
    _, offsets = flat_column(table.column("response_ids"))
    tokens: dict[str, Any] = {}
    for name in TOKEN_COLUMNS:
        column = table.column(name)
        tokens[f"{name}_N"] = None
        if not table.num_rows or column.null_count < table.num_rows:
            tokens[f"{name}_N"], found = flat_column(column)
            check_offsets(path, name, found, offsets)
    if tokens["behavior_logprobs_N"] is None:  # exact where responses were drawn at temperature 1 from all
        tokens["behavior_logprobs_N"] = tokens["logprobs_N"]
    return tokens, offsets


def _signal_columns(
    cache: Cache,
    name: str,
    shard: int,
    rollouts: pa.Table,
    with_topk: bool,
    contents: Mapping[Path, pa.Buffer],
    check: bool,
) -> SignalColumns:
    columns = SIGNALS.names if with_topk else ["rollout_id", "logprobs"]
    path = cache.file(shard, name)
    table = read_columns(cache, shard, columns, name, contents.get(path))
    check_rollout_ids(path, table.column("rollout_id"), rollouts.column("rollout_id"))
    if check:
        manifest, width = cache.signals[name].manifest, cache.manifest.vocabulary_size
        refuse_faults(path, score_faults(table, rollouts, manifest, width))
    _, offsets = flat_column(rollouts.column("response_ids"))
    horizon = cache.signals[name].manifest.horizon
    found = _signal_values(path, table, scored_offsets(horizon, offsets), with_topk)
    return found if horizon is None else _at_full_length(found, scored_tokens(horizon, offsets))


def _signal_values(path: Path, table: pa.Table, offsets: Offsets, with_topk: bool) -> SignalColumns:
    """A signal's columns as they lie on disk."""
    logprobs, found = flat_column(table.column("logprobs"))
    check_offsets(path, "logprobs", found, offsets)
    if not with_topk:
        return SignalColumns(logprobs, None, None, None, None)
    tails, found = flat_column(table.column("tail_logprobs"))
    check_offsets(path, "tail_logprobs", found, offsets)
    return SignalColumns(logprobs, tails, *topk_columns(path, table, offsets))


def _at_full_length(signal: SignalColumns, is_scored_N: Bools) -> SignalColumns:
    """A signal with a horizon at the length of the responses."""
    logprobs_N = spread(signal.logprobs_N, is_scored_N, np.nan)
    if signal.tail_logprobs_N is None or signal.topk_offsets is None:
        return SignalColumns(logprobs_N, None, None, None, None)
    ends = spread(np.diff(signal.topk_offsets), is_scored_N, 0).cumsum()
    return SignalColumns(
        logprobs_N,
        spread(signal.tail_logprobs_N, is_scored_N, np.nan),
        np.concatenate([np.zeros(1, np.int64), ends]),
        signal.topk_ids_C,
        signal.topk_logprobs_C,
    )


def _with_hidden(columns: SignalColumns, hidden: HiddenColumns | None) -> SignalColumns:
    return columns if hidden is None else replace(columns, hidden=hidden)


def _hidden_columns(
    cache: Cache, name: str, shard: int, rollouts: pa.Table, contents: Mapping[Path, pa.Buffer]
) -> HiddenColumns:
    """The hidden states of a signal, every row checked: it costs little beside the reading."""
    path, described = cache.file(shard, name), cache.signals[name].manifest.hidden
    if described is None:
        raise CacheError(f"signal {name} of {cache.path} keeps no hidden states")
    names = [field.name for field in HIDDEN_COLUMNS][: 1 if described.channels is None else 2]
    table = read_columns(cache, shard, names, name, contents.get(path))
    refuse_faults(path, hidden_faults(table, rollouts, described))
    return hidden_columns(table, described, read_channels(signal_folder(cache.path, name), described))


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
