"""What must hold for every row of a cache, vectorised over a block of rows.

R = rollouts in the block, N = their response tokens, C = top-k entries of all positions; nats throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightopd.cache.shards import AGAIN
from lightopd.cache.signals.horizon import in_words, scored_lengths, scored_offsets, scored_tokens
from lightopd.cache.signals.rounding import largest_error, largest_tail_error
from lightopd.cache.tables import flat_column, rollout_id
from lightopd.errors import CacheError
from lightopd.schemas.cache import STUDENTS_OWN, TOKEN_COLUMNS
from lightopd.schemas.configs import Horizon
from lightopd.schemas.manifest import CacheManifest, SignalManifest

BLOCK_ROWS = 64
"""Rows that are looked at together, which bounds the memory."""
LOGPROB_TOLERANCE = 1e-4
"""Nats above 0 that float noise may reach."""
MASS_TOLERANCE = 1e-5
"""Distance of a distribution's float32 mass from 1."""

FINISH_REASONS = ("stop", "length")

Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fault:
    """A check that failed in a block."""

    check: str
    """Name of the check; faults of one check are told as one."""
    row: int
    """First row where it failed, counted from the block's start."""
    what: str
    count: int
    """Places where it failed."""


@dataclass(frozen=True, slots=True)
class _Scores:
    """A block of a signal beside its rollouts."""

    offsets: NDArray[np.int64]
    sampled_ids_N: NDArray[Any]
    logprobs_N: NDArray[Any]
    tails_N: NDArray[Any]
    counts_N: NDArray[Any]
    position_C: NDArray[np.int64]
    ids_C: NDArray[Any]
    logprobs_C: NDArray[Any]


def refuse_faults(path: Path, faults: Iterator[Fault]) -> None:
    """Refuse a shard with a fault.

    Raises:
        CacheError: names the first one, with file and row.
    """
    fault = next(faults, None)
    if fault is not None:
        raise CacheError(
            f"{path} row {fault.row}: {fault.what}; `lightopd verify` names everything that is wrong; {AGAIN}"
        )


def rollout_faults(rollouts: pa.Table, manifest: CacheManifest, seen: set[str]) -> Iterator[Fault]:
    """Faults in rollouts, in blocks of rows; `seen` has the ids of the shards before, and gets these."""
    for start in range(0, rollouts.num_rows, BLOCK_ROWS):
        yield from _shifted(_block_of_rollouts(rollouts.slice(start, BLOCK_ROWS), manifest, seen), start)


def score_faults(
    scores: pa.Table, rollouts: pa.Table, signal: SignalManifest, vocabulary_size: int
) -> Iterator[Fault]:
    """Faults in a signal beside its rollouts, in blocks of rows; without a top-k, in the rest."""
    if scores.num_rows != rollouts.num_rows:
        what = f"the file has {scores.num_rows} rows, its rollouts have {rollouts.num_rows}"
        yield Fault("rows", min(scores.num_rows, rollouts.num_rows), what, 1)
        return
    for start in range(0, scores.num_rows, BLOCK_ROWS):
        block, theirs = (table.slice(start, BLOCK_ROWS) for table in (scores, rollouts))
        yield from _shifted(_block_of_scores(block, theirs, signal, vocabulary_size), start)


def _shifted(faults: Iterator[Fault], start: int) -> Iterator[Fault]:
    return (replace(fault, row=fault.row + start) for fault in faults)


def _block_of_rollouts(table: pa.Table, manifest: CacheManifest, seen: set[str]) -> Iterator[Fault]:
    ids_N, offsets = flat_column(table.column("response_ids"))
    prompts, prompt_offsets = flat_column(table.column("prompt_ids"))
    yield from _at_rows("empty", np.diff(offsets) == 0, "its response is empty")
    yield from _at_rows("empty prompt", np.diff(prompt_offsets) == 0, "its prompt is empty")
    yield from _vocabulary_faults("response_ids", ids_N, offsets, manifest.vocabulary_size)
    yield from _vocabulary_faults("prompt_ids", prompts, prompt_offsets, manifest.vocabulary_size)
    yield from _identity_faults(table, manifest, seen)
    yield from _finish_faults(table, ids_N, offsets, manifest)
    for name in TOKEN_COLUMNS[1:]:
        yield from _token_column_faults(table, name, offsets, manifest)
    rewards = table.column("reward").to_numpy()
    is_broken = table.column("reward").is_valid().to_numpy() & ~np.isfinite(rewards)
    yield from _at_rows("reward", is_broken, "its reward is not a finite number")


def _block_of_scores(
    table: pa.Table, rollouts: pa.Table, signal: SignalManifest, vocabulary_size: int
) -> Iterator[Fault]:
    own, theirs = table.column("rollout_id").to_pylist(), rollouts.column("rollout_id").to_pylist()
    is_other = np.array([a != b for a, b in zip(own, theirs, strict=True)], dtype=np.bool_)
    yield from _at_rows("alignment", is_other, "its rollout_id is not that of the rollouts' row")
    length_faults = list(_score_length_faults(table, rollouts, signal.horizon))
    yield from length_faults
    if length_faults or is_other.any():
        return
    if "topk_ids" not in table.column_names:
        yield from _logprob_faults("logprobs", *flat_column(table.column("logprobs")))
        return
    scores = _scores(table, rollouts, signal.horizon)
    yield from _score_range_faults(scores, signal, vocabulary_size)
    yield from _topk_order_faults(scores, vocabulary_size)
    yield from _mass_faults(scores, signal.topk_dtype)
    yield from _sampled_faults(scores, signal.topk_dtype)
    if signal.support is None:  # else the entries are not the most likely tokens
        yield from _outside_faults(scores, signal.topk_dtype)


def _identity_faults(table: pa.Table, manifest: CacheManifest, seen: set[str]) -> Iterator[Fault]:
    names = table.column("rollout_id").to_pylist()
    is_repeated = []
    for name in names:
        is_repeated.append(name in seen)
        seen.add(name)
    yield from _at_rows("unique", np.array(is_repeated, np.bool_), "its rollout_id occurs in an earlier row")
    samplers = {source.origin: source.sampler.identity for source in manifest.joined}
    sampler = manifest.sampler.identity if manifest.sampler else ""
    origins = table.column("origin").to_pylist()
    prompts, prompt_offsets = flat_column(table.column("prompt_ids"))
    ids_N, offsets = flat_column(table.column("response_ids"))
    indices = table.column("sample_index").to_pylist()
    is_other = [
        name
        != rollout_id(
            prompts[prompt_offsets[row] : prompt_offsets[row + 1]],
            ids_N[offsets[row] : offsets[row + 1]],
            samplers.get(origins[row], sampler),
            indices[row],
        )
        for row, name in enumerate(names)
    ]
    yield from _at_rows("hash", np.array(is_other, np.bool_), "its rollout_id is not the hash of its content")


def _finish_faults(
    table: pa.Table, ids_N: NDArray[Any], offsets: NDArray[np.int64], manifest: CacheManifest
) -> Iterator[Fault]:
    reasons = np.array(table.column("finish_reason").to_pylist(), dtype=object)
    truncated = table.column("truncated").to_numpy()
    origins = np.array(table.column("origin").to_pylist(), dtype=object)
    is_unknown = ~np.isin(reasons, FINISH_REASONS)
    what = f"its finish_reason is none of {', '.join(FINISH_REASONS)}"
    yield from _at_rows("finish_reason", is_unknown, what)
    yield from _at_rows(
        "truncated", truncated != (reasons == "length"), "truncated and finish_reason disagree"
    )
    known: list[str] = [source.origin for source in manifest.joined] or [manifest.origin]
    known += ["student", "teacher"] if manifest.origin == "imported" else []
    is_other = np.array([origin not in known for origin in origins], np.bool_)
    yield from _at_rows(
        "origin", is_other, f"its origin is not {' or '.join(map(repr, dict.fromkeys(known)))}"
    )
    end_ids = manifest.tokenizer.special_ids.get("eos", []) if manifest.tokenizer else []
    if end_ids and len(ids_N):
        last = ids_N[np.maximum(offsets[1:] - 1, 0)]
        is_open = (reasons == "stop") & (np.diff(offsets) > 0) & ~np.isin(last, end_ids)
        yield from _at_rows("end token", is_open, f"it stopped, but its last id is none of {end_ids}")


def _vocabulary_faults(
    name: str, ids: NDArray[Any], offsets: NDArray[np.int64], vocabulary_size: int
) -> Iterator[Fault]:
    is_outside = (ids < 0) | (ids >= vocabulary_size)
    yield from _at_tokens(name, is_outside, offsets, ids, f"is outside the vocabulary of {vocabulary_size}")


def _token_column_faults(
    table: pa.Table, name: str, offsets: NDArray[np.int64], manifest: CacheManifest
) -> Iterator[Fault]:
    column = table.column(name)
    is_null = ~column.is_valid().to_numpy()
    is_teachers = np.array([origin == "teacher" for origin in table.column("origin").to_pylist()], np.bool_)
    if manifest.origin == "mixed" and name in STUDENTS_OWN:
        what = f"it is the teacher's and has {name}, which a mixed cache keeps of the student only"
        yield from _at_rows(f"{name} origin", is_teachers & ~is_null, what)
        is_null &= ~is_teachers
    if not column.null_count < len(is_null):
        if name == "logprobs" and manifest.origin != "imported":
            yield from _at_rows(name, is_null, "it has no logprobs of the sampler")
        return
    values, found = flat_column(column)
    is_short = np.diff(found) != np.diff(offsets)
    yield from _at_rows(f"{name} length", is_short, f"{name} is not as long as response_ids")
    if is_short.any():
        return
    if name in ("logprobs", "behavior_logprobs"):
        yield from _logprob_faults(name, values, offsets)
    elif name == "entropies":
        is_broken = ~np.isfinite(values) | (values < -LOGPROB_TOLERANCE)
        yield from _at_tokens(name, is_broken, offsets, values, "is not an entropy")
    elif name == "turns":
        is_start = np.zeros(len(values), np.bool_)
        is_start[offsets[:-1][np.diff(offsets) > 0]] = True
        is_back = np.diff(values, prepend=0) < 0
        is_broken = (values < 0) | (is_back & ~is_start)
        yield from _at_tokens(name, is_broken, offsets, values, "is negative or goes back")


def _score_length_faults(table: pa.Table, rollouts: pa.Table, horizon: Horizon | None) -> Iterator[Fault]:
    wanted = scored_lengths(horizon, np.diff(flat_column(rollouts.column("response_ids"))[1]))
    needed = "response_ids" if horizon is None else f"the {in_words(horizon)} of response_ids"
    is_whole = "topk_counts" in table.column_names
    for name in ("logprobs", "topk_counts", "tail_logprobs") if is_whole else ("logprobs",):
        found = np.diff(flat_column(table.column(name))[1])
        yield from _at_rows(f"{name} length", found != wanted, f"{name} is not as long as {needed}")
    if not is_whole:
        return
    counts, offsets = flat_column(table.column("topk_counts"))
    totals = np.diff(_starts(counts)[offsets])
    for name in ("topk_ids", "topk_logprobs"):
        found = np.diff(flat_column(table.column(name))[1])
        yield from _at_rows(f"{name} length", found != totals, f"{name} is not as long as topk_counts say")


def _scores(table: pa.Table, rollouts: pa.Table, horizon: Horizon | None) -> _Scores:
    sampled, of_responses = flat_column(rollouts.column("response_ids"))
    offsets = scored_offsets(horizon, of_responses)
    sampled = sampled if horizon is None else sampled[scored_tokens(horizon, of_responses)]
    flat = {name: flat_column(table.column(name))[0] for name in table.column_names if name != "rollout_id"}
    counts = flat["topk_counts"]
    return _Scores(
        offsets=offsets,
        sampled_ids_N=sampled,
        logprobs_N=flat["logprobs"].astype(np.float64),
        tails_N=flat["tail_logprobs"].astype(np.float64),
        counts_N=counts,
        position_C=np.repeat(np.arange(len(counts)), np.maximum(counts, 0)),
        ids_C=flat["topk_ids"],
        logprobs_C=flat["topk_logprobs"].astype(np.float64),
    )


def _score_range_faults(scores: _Scores, signal: SignalManifest, vocabulary_size: int) -> Iterator[Fault]:
    yield from _logprob_faults("logprobs", scores.logprobs_N, scores.offsets)
    yield from _logprob_faults("topk_logprobs", scores.logprobs_C, _starts(scores.counts_N)[scores.offsets])
    is_broken = np.isnan(scores.tails_N) | (scores.tails_N > LOGPROB_TOLERANCE)
    yield from _at_tokens(
        "tail_logprobs", is_broken, scores.offsets, scores.tails_N, "is not a log-probability"
    )
    full = min(signal.top_k, vocabulary_size)
    is_off = (scores.counts_N < 0) | (scores.counts_N > full)
    if signal.min_probability == 0 and signal.support is None and signal.id_limit is None:
        is_off = scores.counts_N != full
    yield from _at_tokens(
        "topk_counts", is_off, scores.offsets, scores.counts_N, f"where top_k asks for {full}"
    )
    yield from _vocabulary_faults(
        "topk_ids", scores.ids_C, _starts(scores.counts_N)[scores.offsets], vocabulary_size
    )


def _topk_order_faults(scores: _Scores, vocabulary_size: int) -> Iterator[Fault]:
    position, logprobs = scores.position_C, scores.logprobs_C
    is_rising = (np.diff(logprobs) > 0) & (np.diff(position) == 0)
    yield from _at_positions("order", position[1:][is_rising], scores, "its top-k is not sorted")
    width = max(
        vocabulary_size, int(scores.ids_C.max(initial=0)) + 1
    )  # ids beyond it are faults of their own
    keys = np.sort(position * width + scores.ids_C)
    twice = keys[1:][np.diff(keys) == 0] // width
    yield from _at_positions("twice", twice, scores, "a token id occurs twice in its top-k")


def _mass_faults(scores: _Scores, topk_dtype: str) -> Iterator[Fault]:
    """Top-k and tail together are a distribution, up to what the number format rounds away."""
    mass_C = np.exp(scores.logprobs_C)
    total_N = _sum_at(scores, mass_C) + np.exp(scores.tails_N)
    rounding_C = np.expm1(largest_error(scores.logprobs_C, topk_dtype))
    rounding_N = np.exp(scores.tails_N) * np.expm1(largest_tail_error(topk_dtype))
    allowed_N = MASS_TOLERANCE + _sum_at(scores, mass_C * rounding_C) + rounding_N
    is_off = ~(np.abs(total_N - 1) <= allowed_N)
    what = "is the sum of top-k and tail probabilities, which must be 1"
    yield from _at_tokens("mass", is_off, scores.offsets, total_N, what)


def _sampled_faults(scores: _Scores, topk_dtype: str) -> Iterator[Fault]:
    """The sampled token agrees with its top-k entry, where it has one."""
    is_sampled_C = scores.ids_C == scores.sampled_ids_N[scores.position_C]
    inside = scores.position_C[is_sampled_C]
    apart = np.abs(scores.logprobs_C[is_sampled_C] - scores.logprobs_N[inside])
    allowed = LOGPROB_TOLERANCE + largest_error(scores.logprobs_N[inside], topk_dtype)
    what = "the sampled token's log-probability is not that of its top-k entry"
    yield from _at_positions("sampled", inside[apart > allowed], scores, what)


def _outside_faults(scores: _Scores, topk_dtype: str) -> Iterator[Fault]:
    """A sampled token outside the top-k is no likelier than its last entry."""
    if not len(scores.ids_C):
        return
    is_outside_N = scores.counts_N > 0
    is_outside_N[scores.position_C[scores.ids_C == scores.sampled_ids_N[scores.position_C]]] = False
    last_N = scores.logprobs_C[np.maximum(_starts(scores.counts_N)[1:] - 1, 0)]
    allowed_N = last_N + LOGPROB_TOLERANCE + largest_error(last_N, topk_dtype)
    is_likelier = is_outside_N & (scores.logprobs_N > allowed_N)
    what = "the sampled token is outside the top-k, but likelier than its last entry"
    yield from _at_positions("outside", np.flatnonzero(is_likelier), scores, what)


def _logprob_faults(name: str, values: NDArray[Any], offsets: NDArray[np.int64]) -> Iterator[Fault]:
    is_broken = ~np.isfinite(values) | (values > LOGPROB_TOLERANCE)
    yield from _at_tokens(name, is_broken, offsets, values, "is not a log-probability")


def _sum_at(scores: _Scores, values_C: NDArray[Any]) -> NDArray[Any]:
    return np.bincount(scores.position_C, weights=values_C, minlength=len(scores.counts_N))


def _starts(counts: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _at_rows(check: str, is_broken_R: Flags, what: str) -> Iterator[Fault]:
    if is_broken_R.any():
        yield Fault(check, int(is_broken_R.argmax()), what, int(is_broken_R.sum()))


def _at_tokens(
    check: str, is_broken: Flags, offsets: NDArray[np.int64], values: NDArray[Any], what: str
) -> Iterator[Fault]:
    """Fault at the first broken value of a flat column; `offsets` cut it into rows."""
    if is_broken.any():
        place = int(is_broken.argmax())
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        text = f"{check} has {values[place]} at place {place - offsets[row]}, which {what}"
        yield Fault(check, row, text, int(is_broken.sum()))


def _at_positions(check: str, positions: NDArray[np.int64], scores: _Scores, what: str) -> Iterator[Fault]:
    if len(positions):
        place = int(positions.min())
        row = int(np.searchsorted(scores.offsets, place, side="right")) - 1
        yield Fault(check, row, f"at position {place - scores.offsets[row]} {what}", len(positions))
