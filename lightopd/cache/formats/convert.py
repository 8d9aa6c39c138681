"""The official Lightning-OPD Parquet as a cache."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightopd import __version__
from lightopd.cache.row_checks import rollout_faults, score_faults
from lightopd.cache.shards import write_shard
from lightopd.cache.store import (
    create_cache,
    create_signal,
    open_cache,
)
from lightopd.cache.tables import rollout_id, rollouts_to_table, scores_to_table, split_lists
from lightopd.errors import InputError
from lightopd.files import file_sha256
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.manifest import CacheManifest, SftLineage, SignalManifest
from lightopd.schemas.records import Ids, Rollout, RolloutSignal

EncodePrompt = Callable[[Any], Sequence[int]]

SHARD_ROLLOUTS = 256

METADATA_FIELDS = {
    "prompt_tokens": pa.list_(pa.int64()),
    "response_tokens": pa.list_(pa.int64()),
    "teacher_log_probs": pa.list_(pa.float64()),
    "loss_mask": pa.list_(pa.int64()),
    "response": pa.string(),
}


@dataclass(frozen=True, slots=True)
class _Source:
    """An official file and what is needed to read it."""

    parquet: Path
    encode_prompt: EncodePrompt | None
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    """Row of the file, from 0."""
    rollout: Rollout
    scores: RolloutSignal


@dataclass(frozen=True, slots=True)
class Converted:
    """What `convert_official` did."""

    cache: Path
    num_rollouts: int
    num_tokens: int
    dropped: dict[str, int]
    """Rows left out, by reason."""


def convert_official(
    parquet: Path,
    out: Path,
    *,
    vocabulary_size: int,
    encode_prompt: EncodePrompt | None = None,
    signal: str = "teacher",
) -> Converted:
    """Turn the official Lightning-OPD Parquet into a cache whose lineage is unknown.

    The official files have no token ids of the prompt, no end token, no finish reason and no student
    log-probabilities: prompts are encoded anew, `logprobs` stay empty, and every response counts as finished.

    Args:
        parquet: file with `prompt` (text or chat turns) and `metadata` with `response_tokens`,
            `teacher_log_probs`, optionally `loss_mask`, `response` and `prompt_tokens`.
        out: cache folder that is made, with one signal of sampled tokens only.
        vocabulary_size: width of the student's output; every id must lie below it.
        encode_prompt: `prompt` column to token ids; needed unless metadata has `prompt_tokens`.
        signal: name of the signal.

    Raises:
        InputError: the file cannot be read, a column is missing, lengths differ, or a number is broken; the
            message names the row.
        OutputError: `out` belongs to another run or cannot be written.

    Source: Lightning-OPD, data_curation/prepare_lightning_opd.py, phase 2.
    """
    if not parquet.is_file():
        raise InputError(f"{parquet} cannot be read as Parquet: it is no file; check the path")
    source = _Source(parquet, encode_prompt, vocabulary_size)
    prompts, dropped, num_tokens = _survey(source, signal)
    manifest = _imported_manifest(source, prompts)
    scored = _imported_signal(signal, manifest)
    create_cache(out, manifest)
    create_signal(open_cache(out, signals=(), incomplete=True), scored)
    for index, rows in enumerate(_batched(_official_rows(source))):
        rollouts, scores = _tables(rows, scored)
        left_out = dropped if index == 0 else {}
        parts: list[tuple[CacheManifest | SignalManifest, pa.Table, dict[str, int]]]
        parts = [(manifest, rollouts, left_out), (scored, scores, {})]
        for made, table, without in parts:
            write_shard(
                out / made.kind, index, table, kind=made.kind, fingerprint=made.fingerprint(),
                dropped=without, made_from=made,
            )  # fmt: skip
    return Converted(out, len(prompts), num_tokens, dropped)


def _survey(source: _Source, signal: str) -> tuple[list[str], dict[str, int], int]:
    """Check every row before anything is written: prompt id of each kept row, dropped rows, tokens."""
    prompts, num_tokens, seen = [], 0, set[str]()
    manifest = _imported_manifest(source, [])
    scored = _imported_signal(signal, manifest)
    for rows in _batched(_official_rows(source)):
        rollouts, scores = _tables(rows, scored)
        of_rollouts = rollout_faults(rollouts, manifest, seen)
        for fault in chain(of_rollouts, score_faults(scores, rollouts, scored, source.vocabulary_size)):
            raise InputError(f"{source.parquet} row {rows[fault.row].number}: {fault.what}; remove the row")
        prompts += [row.rollout.prompt_id for row in rows]
        num_tokens += sum(len(row.rollout.response_ids) for row in rows)
    if not prompts:
        raise InputError(f"{source.parquet} has no row with response tokens; nothing can be imported")
    num_dropped = pq.read_metadata(source.parquet).num_rows - len(prompts)
    return prompts, {"empty response": num_dropped} if num_dropped else {}, num_tokens


def _tables(rows: Sequence[_Row], signal: SignalManifest) -> tuple[pa.Table, pa.Table]:
    """Rows as a shard of rollouts and one of the signal."""
    names = [row.rollout.rollout_id for row in rows]
    scores = scores_to_table(names, [row.scores for row in rows], signal.topk_dtype)
    return rollouts_to_table([row.rollout for row in rows]), scores


def _official_rows(source: _Source) -> Iterator[_Row]:
    """Rows with a response, in the file's order; rows of one prompt are numbered."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(_read_rows(source.parquet)):
        if row["response_tokens"] is None or not len(row["response_tokens"]):
            continue
        where = f"{source.parquet} row {number}"
        for name in ("prompt_tokens", "response_tokens", "loss_mask"):
            _refuse_nulls(where, name, row[name])
        prompt_ids = _prompt_ids(where, row, source.encode_prompt)
        _check_vocabulary(where, "prompt", prompt_ids, source.vocabulary_size)
        _check_vocabulary(where, "response", row["response_tokens"], source.vocabulary_size)
        prompt_id = hashlib.sha256(prompt_ids.astype("<i4").tobytes()).hexdigest()[:32]
        rollout, scores = _official_row(where, row, prompt_ids.astype(np.int32), prompt_id, seen[prompt_id])
        seen[prompt_id] += 1
        yield _Row(number, rollout, scores)


def _read_rows(parquet: Path) -> Iterator[dict[str, Any]]:
    """Rows with `prompt` and the fields of `metadata`; lists as numpy arrays, None for what is missing."""
    try:
        with pq.ParquetFile(parquet) as file:
            _check_columns(parquet, file.schema_arrow)
            for batch in file.iter_batches(batch_size=64, columns=["prompt", "metadata"]):
                columns = {"prompt": batch.column("prompt").to_pylist(), **_metadata_columns(batch)}
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{parquet} cannot be read as Parquet: {reason}; check the path") from error


def _metadata_columns(batch: pa.RecordBatch) -> dict[str, list[Any]]:
    metadata = batch.column("metadata")
    columns: dict[str, list[Any]] = {}
    names = {field.name for field in metadata.type}
    for name, kind in METADATA_FIELDS.items():
        if name not in names:
            columns[name] = [None] * len(batch)
            continue
        try:
            values = pc.struct_field(metadata, name).cast(kind)
        except pa.ArrowException as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"metadata.{name} is no {kind}: {reason}; write the file again") from error
        is_list = pa.types.is_list(kind)
        columns[name] = split_lists(pa.chunked_array([values])) if is_list else values.to_pylist()
    return columns


def _check_columns(parquet: Path, schema: pa.Schema) -> None:
    for name in ("prompt", "metadata"):
        if name not in schema.names:
            raise InputError(
                f"{parquet} has no column {name!r} (it has {', '.join(schema.names)}); "
                "an official Lightning-OPD file has prompt and metadata"
            )
    kind = schema.field("metadata").type
    names = [field.name for field in kind] if pa.types.is_struct(kind) else []
    for name in ("response_tokens", "teacher_log_probs"):
        if name not in names:
            raise InputError(
                f"{parquet} has no metadata.{name} (metadata has {', '.join(names) or 'no fields'}); "
                "run phase 2 of prepare_lightning_opd.py first"
            )


def _batched(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while batch := list(islice(rows, SHARD_ROLLOUTS)):
        yield batch


def _prompt_ids(where: str, row: dict[str, Any], encode_prompt: EncodePrompt | None) -> NDArray[np.int64]:
    ids = row["prompt_tokens"]
    if ids is None:
        if encode_prompt is None:
            raise InputError(
                f"{where} has no metadata.prompt_tokens; name the student, whose tokenizer encodes prompts"
            )
        ids = encode_prompt(row["prompt"])
    if not len(ids):
        raise InputError(f"{where} has a prompt of no tokens; remove the row")
    return np.array(ids, dtype=np.int64)


def _official_row(
    where: str, row: dict[str, Any], prompt_ids: Ids, prompt_id: str, sample_index: int
) -> tuple[Rollout, RolloutSignal]:
    response_ids = row["response_tokens"].astype(np.int32)
    length = len(response_ids)
    logprobs = _floats(where, "teacher_log_probs", row["teacher_log_probs"], length)
    mask = row["loss_mask"]
    rollout = Rollout(
        rollout_id=rollout_id(prompt_ids, response_ids, "", sample_index),
        prompt_id=prompt_id,
        sample_index=sample_index,
        origin="imported",
        domain=None,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        loss_mask=np.ones(length, np.bool_) if mask is None else _mask(where, mask, length),
        turns=np.zeros(length, np.int32),
        logprobs=None,
        entropies=None,
        finish_reason="stop",
        truncated=False,
        answer=None,
        reward=None,
        prompt_text=row["prompt"] if isinstance(row["prompt"], str) else None,
        response_text=row["response"],
    )
    no_entries, no_values = np.zeros(0, np.int32), np.zeros(0, np.float32)
    counts, tails = np.zeros(length, np.int32), np.zeros(length, np.float32)
    return rollout, RolloutSignal(logprobs, counts, no_entries, no_values, tails)


def _floats(where: str, name: str, values: Any, length: int) -> NDArray[np.float32]:
    if values is None or len(values) != length:
        found = "none" if values is None else len(values)
        raise InputError(
            f"{where} has {length} response_tokens but {found} {name}; remove the row or make it again"
        )
    floats = np.array(values, dtype=np.float32)
    if not np.isfinite(floats).all():
        place = int((~np.isfinite(floats)).argmax())
        raise InputError(f"{where} has {name} = {floats[place]} at position {place}; remove the row")
    return floats


def _mask(where: str, values: Any, length: int) -> NDArray[np.bool_]:
    mask = _floats(where, "loss_mask", values, length)
    is_broken = ~np.isin(mask, (0, 1))
    if is_broken.any():
        place = int(is_broken.argmax())
        raise InputError(f"{where} has loss_mask = {mask[place]:g} at position {place}, not 0 or 1")
    return mask.astype(np.bool_)


def _refuse_nulls(where: str, name: str, values: NDArray[Any] | None) -> None:
    """Refuse nulls within a list, which numpy shows as NaN."""
    if values is None or values.dtype.kind != "f":
        return
    is_null = np.isnan(values)
    if is_null.any():
        raise InputError(f"{where} has a null in {name} at position {int(is_null.argmax())}; remove the row")


def _check_vocabulary(where: str, name: str, ids: NDArray[Any], vocabulary_size: int) -> None:
    is_outside = (ids < 0) | (ids >= vocabulary_size)
    if is_outside.any():
        place = int(is_outside.argmax())
        raise InputError(
            f"{where} has {name} id {ids[place]} at position {place}, outside the vocabulary of "
            f"{vocabulary_size}; name the student whose tokenizer made these ids"
        )


def _imported_manifest(source: _Source, prompts: list[str]) -> CacheManifest:
    return CacheManifest(
        schema_version=SCHEMA_VERSION,
        lightopd_version=__version__,
        origin="imported",
        sampler=None,
        precision=None,
        sft=SftLineage(proof="unknown"),
        tokenizer=None,
        vocabulary_size=source.vocabulary_size,
        rendering={"render": "imported", "file": file_sha256(source.parquet)},
        sampling=None,
        prompts=canonical_hash(list(prompts)),
        num_prompts=len(set(prompts)),
        shard_rollouts=SHARD_ROLLOUTS,
        num_shards=-(-len(prompts) // SHARD_ROLLOUTS),
        engine=None,
    )


def _imported_signal(name: str, manifest: CacheManifest) -> SignalManifest:
    return SignalManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        role="imported",
        rollouts=manifest.fingerprint(),
        model=None,
        precision=None,
        tokenizer=None,
        top_k=0,
        topk_dtype="float32",
        tail="exact",
        engine=None,
    )
