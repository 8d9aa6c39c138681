"""Records to Arrow tables and back, with the checks that keep broken numbers out of a cache.

R = response tokens of one rollout, C = top-k entries of all its positions laid end to end.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightopd.cache.signals.rounding import rounded, rounded_tails
from lightopd.errors import EngineError
from lightopd.schemas.cache import HIDDEN_COLUMNS, ROLLOUTS, SIGNALS, STUDENTS_OWN, TOKEN_COLUMNS
from lightopd.schemas.records import HiddenCodes, Ids, Rollout, RolloutSignal
from lightopd.schemas.signals.kinds import HiddenStates

MAX_LIST_VALUES = 2**31 - 1
"""Arrow's list offsets are int32."""


def rollout_id(prompt_ids: Ids, response_ids: Ids, sampler_identity: str, sample_index: int) -> str:
    """Content hash of a rollout: 32 hex digits, the same on every machine.

    SHA-256, cut to 128 bits, over the little-endian bytes of: a version tag; the sampler's identity
    (UTF-8, empty for an imported cache) after its length; the sample index; then prompt ids and response
    ids, each as int32 after its length. Lengths and the index are int64.
    """
    sampler = sampler_identity.encode()
    lengths = np.array([len(sampler), sample_index, len(prompt_ids), len(response_ids)], dtype="<i8")
    digest = hashlib.sha256(b"lightopd.rollout.1\n")
    digest.update(lengths.tobytes())
    digest.update(sampler)
    digest.update(np.asarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.asarray(response_ids, dtype="<i4").tobytes())
    return digest.hexdigest()[:32]


def rollouts_to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Rollouts as a table in the schema `ROLLOUTS`, in the order given.

    Raises:
        EngineError: a log-probability, entropy or reward is NaN or infinite, the columns of a rollout
            differ in length, or only some rollouts have log-probabilities or entropies.
    """
    for rollout in rollouts:
        _check_rollout(rollout)
    return pa.table([_rollout_column(field, rollouts) for field in ROLLOUTS], schema=ROLLOUTS)


def scores_to_table(
    rollout_ids: Sequence[str],
    scores: Sequence[RolloutSignal],
    topk_dtype: str,
    hidden: HiddenStates | None = None,
) -> pa.Table:
    """Scores as a table in the schema of their signal; row i belongs to `rollout_ids[i]`.

    Args:
        rollout_ids: of the rollouts, in the rows' order.
        scores: one for each rollout.
        topk_dtype: rounds the top-k log-probabilities, and the tail where it is a step; see
            `lightopd.cache.signals.rounding`.
        hidden: how the hidden states are kept; None where they are not.

    Raises:
        EngineError: a value is NaN or infinite (only a tail may be -inf: nothing lies outside the top-k),
            lengths disagree, or a top-k log-probability does not fit into `topk_dtype`.
    """
    if len(rollout_ids) != len(scores):
        raise EngineError(
            f"{len(rollout_ids)} rollouts were sent to the engine, {len(scores)} scores came back"
        )
    for name, score in zip(rollout_ids, scores, strict=True):
        _check_scores(name, score)
    rows = {field.name: [getattr(score, field.name) for score in scores] for field in list(SIGNALS)[1:]}
    if topk_dtype != "float32":
        named = zip(rollout_ids, scores, strict=True)
        rows["topk_logprobs"] = [_rounded(name, score, topk_dtype) for name, score in named]
        rows["tail_logprobs"] = [rounded_tails(score.tail_logprobs, topk_dtype) for score in scores]
    columns = [_list_array(SIGNALS.field(name), values) for name, values in rows.items()]
    table = pa.table([pa.array(list(rollout_ids), pa.string()), *columns], schema=SIGNALS)
    return table if hidden is None else _with_hidden(table, rollout_ids, scores, hidden)


def _with_hidden(
    table: pa.Table, rollout_ids: Sequence[str], scores: Sequence[RolloutSignal], hidden: HiddenStates
) -> pa.Table:
    """The table with the columns of hidden states."""
    for name, score in zip(rollout_ids, scores, strict=True):
        _check_hidden(name, score, hidden)
    columns: list[pa.Array] = [pa.array([_little_endian(each.hidden) for each in scores], pa.large_binary())]
    if hidden.channels is not None:
        columns.append(_list_array(HIDDEN_COLUMNS[1], [each.hidden_scales for each in scores]))  # type: ignore[misc]
    for field, column in zip(HIDDEN_COLUMNS, columns, strict=False):
        table = table.append_column(field, column)
    return table


def _little_endian(codes_RD: HiddenCodes | None) -> bytes:
    assert codes_RD is not None, "checked"
    return codes_RD.astype(codes_RD.dtype.newbyteorder("<"), copy=False).tobytes()


def _check_hidden(name: str, scores: RolloutSignal, hidden: HiddenStates) -> None:
    found = None if scores.hidden is None else scores.hidden.shape
    wanted = (len(scores.logprobs), hidden.size)
    if scores.hidden is None or found != wanted:
        raise EngineError(
            f"rollout {name} has hidden states of shape {found}, {wanted} are needed; the engine must give "
            "one for each response token"
        )
    if hidden.channels is None:
        # All eight bits of the exponent set is NaN or infinity.
        is_bad_R = ((scores.hidden.view(np.uint16) & 0x7F80) == 0x7F80).any(1)
        values_R = np.where(is_bad_R, np.nan, 0.0)
    else:
        assert scores.hidden_scales is not None, "int8 has scales"
        values_R = scores.hidden_scales
    _check_finite(name, "hidden", values_R)


def flat_column(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values of a list column laid end to end, and its int64 offsets [rows + 1], which start at 0.

    Booleans are unpacked; everything else is a read-only view into the Arrow buffers where the column is
    one chunk.
    """
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]


def split_lists(column: pa.ChunkedArray) -> list[NDArray[Any] | None]:
    """A list column as one array for each row; None where the row is null."""
    values, offsets = flat_column(column)
    present = column.is_valid().to_numpy()
    return [
        values[start:end] if is_present else None
        for start, end, is_present in zip(offsets[:-1], offsets[1:], present, strict=True)
    ]


def _rollout_column(field: pa.Field, rollouts: Sequence[Rollout]) -> pa.Array:
    rows = [getattr(rollout, field.name) for rollout in rollouts]
    if not pa.types.is_list(field.type):
        return pa.array(rows, field.type)
    num_missing = sum(row is None for row in rows)
    if num_missing == 0:
        return _list_array(field, rows)
    if num_missing < len(rows):
        missing = next(rollout.rollout_id for rollout in rollouts if getattr(rollout, field.name) is None)
        raise EngineError(
            f"rollout {missing} has no {field.name} while others of its shard have them; "
            "an engine must give them for all rollouts or for none"
        )
    return pa.nulls(len(rows), field.type)


def _list_array(field: pa.Field, rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    """Arrays laid end to end as one list column."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    if offsets[-1] > MAX_LIST_VALUES:
        raise EngineError(
            f"{offsets[-1]} values of {field.name} in one shard are more than {MAX_LIST_VALUES}; "
            "set shard_rollouts or top_k lower"
        )
    dtype = field.type.value_type.to_pandas_dtype()
    values = np.concatenate(rows) if rows else np.zeros(0)
    flat = pa.array(values.astype(dtype, copy=False), field.type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=field.type)


def _check_rollout(rollout: Rollout) -> None:
    length = len(rollout.response_ids)
    for name in TOKEN_COLUMNS:
        values = getattr(rollout, name)
        if values is not None and len(values) != length:
            raise EngineError(
                f"rollout {rollout.rollout_id} has {length} response tokens but {len(values)} {name}"
            )
    for name in STUDENTS_OWN:
        _check_finite(rollout.rollout_id, name, getattr(rollout, name))
    if rollout.reward is not None:
        _check_finite(rollout.rollout_id, "reward", np.array([rollout.reward]))


def _check_scores(name: str, scores: RolloutSignal) -> None:
    length, num_entries = len(scores.logprobs), len(scores.topk_ids)
    counted = int(scores.topk_counts.sum())
    if len(scores.topk_counts) != length or len(scores.tail_logprobs) != length:
        raise EngineError(
            f"rollout {name} has {length} logprobs, {len(scores.topk_counts)} top-k counts and "
            f"{len(scores.tail_logprobs)} tails; they must be one for each response token"
        )
    if counted != num_entries or len(scores.topk_logprobs) != num_entries:
        raise EngineError(
            f"rollout {name} has {num_entries} top-k ids and {len(scores.topk_logprobs)} top-k "
            f"log-probabilities, but its counts add up to {counted}"
        )
    _check_finite(name, "logprobs", scores.logprobs)
    _check_topk_finite(name, scores, scores.topk_logprobs, "float32")
    is_broken = np.isnan(scores.tail_logprobs) | np.isposinf(scores.tail_logprobs)
    if is_broken.any():
        _refuse(name, "tail_logprobs", int(is_broken.argmax()), scores.tail_logprobs[is_broken.argmax()])


def _rounded(name: str, scores: RolloutSignal, topk_dtype: str) -> NDArray[np.float32]:
    values = rounded(scores.topk_logprobs, topk_dtype)
    _check_topk_finite(name, scores, values, topk_dtype)
    return values


def _check_topk_finite(name: str, scores: RolloutSignal, values: NDArray[Any], dtype: str) -> None:
    is_broken = ~np.isfinite(values)
    if is_broken.any():
        entry = int(is_broken.argmax())
        position = int(np.searchsorted(np.cumsum(scores.topk_counts), entry, side="right"))
        _refuse(name, f"topk_logprobs (as {dtype})", position, scores.topk_logprobs[entry])


def _check_finite(name: str, column: str, values: NDArray[Any] | None) -> None:
    if values is not None and not np.isfinite(values).all():
        position = int((~np.isfinite(values)).argmax())
        _refuse(name, column, position, values[position])


def _refuse(name: str, column: str, position: int, value: Any) -> None:
    raise EngineError(
        f"rollout {name} has {column} = {value} at position {position}; a cache holds finite numbers only: "
        "look for overflow in the model (try dtype bfloat16 or float32), or a broken checkpoint"
    )
