"""Caches from and to other formats: the official Lightning-OPD Parquet in, a plain dataset out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightopd import __version__
from lightopd.cache.reader import check_rollout_ids, read_columns
from lightopd.cache.shards import file_sha256, shard_path, write_shard
from lightopd.cache.store import (
    Cache,
    create_cache,
    create_signal,
    open_cache,
    rollouts_folder,
    signal_folder,
)
from lightopd.cache.tables import flat_column, rollout_id, rollouts_to_table, scores_to_table, split_lists
from lightopd.errors import InputError, OutputError
from lightopd.files import write_atomically
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import ROLLOUTS, SCHEMA_VERSION, SIGNALS, list_of
from lightopd.schemas.manifest import CacheManifest, SftLineage, SignalManifest
from lightopd.schemas.records import Ids, Rollout, Scores

EncodePrompt = Callable[[Any], Sequence[int]]

SHARD_ROLLOUTS = 256

METADATA_FIELDS = {
    "prompt_tokens": pa.list_(pa.int64()),
    "response_tokens": pa.list_(pa.int64()),
    "teacher_log_probs": pa.list_(pa.float64()),
    "loss_mask": pa.list_(pa.int64()),
    "response": pa.string(),
}

CARD = """---
configs:
- config_name: default
  data_files: data/*.parquet
---

# Rollouts with teacher log-probabilities

{rollouts} rollouts, {tokens} response tokens; written by lightopd {version}.
Responses by: {origin}; fine-tuning teacher: {proof}.

One row per rollout. `response_ids`, `loss_mask`, `turns`, `logprobs` and `entropies` have one value per
response token; log-probabilities are natural logarithms at temperature 1.

{signals}"""


@dataclass(frozen=True, slots=True)
class _Source:
    """An official file and what is needed to read it."""

    parquet: Path
    encode_prompt: EncodePrompt | None
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class Imported:
    """What `import_official` did."""

    cache: Path
    num_rollouts: int
    num_tokens: int
    dropped: dict[str, int]
    """Rows left out, by reason."""


def import_official(
    parquet: Path,
    out: Path,
    *,
    vocabulary_size: int,
    encode_prompt: EncodePrompt | None = None,
    signal: str = "teacher",
) -> Imported:
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
    source = _Source(parquet, encode_prompt, vocabulary_size)
    prompts, dropped, num_tokens = _survey(source)
    manifest = _imported_manifest(source, prompts)
    scored = _imported_signal(signal, manifest)
    create_cache(out, manifest)
    create_signal(open_cache(out, signals=(), incomplete=True), scored)
    for index, rows in enumerate(_batched(_official_rows(source))):
        fingerprint, left_out = manifest.fingerprint(), dropped if index == 0 else {}
        table = rollouts_to_table([rollout for rollout, _ in rows])
        folder = rollouts_folder(out)
        write_shard(folder, index, table, kind="rollouts", fingerprint=fingerprint, dropped=left_out)
        names = [rollout.rollout_id for rollout, _ in rows]
        table = scores_to_table(names, [scores for _, scores in rows], scored.topk_dtype)
        kind, fingerprint = f"signals/{signal}", scored.fingerprint()
        write_shard(signal_folder(out, signal), index, table, kind=kind, fingerprint=fingerprint)
    return Imported(out, len(prompts), num_tokens, dropped)


def export_dataset(cache: Cache, out: Path) -> list[Path]:
    """Write a cache as plain Parquet with a dataset card; returns the Parquet files.

    One row per rollout, its signals beside it as `<signal>_logprobs`, `<signal>_tail_logprobs` (float32 per
    token), `<signal>_topk_ids` and `<signal>_topk_logprobs` (a list per token). `datasets` loads it by
    `load_dataset("parquet", data_files="OUT/data/*.parquet")`, or by the folder's name.

    Raises:
        OutputError: `out` is not empty, or cannot be written.
        CacheError: a shard is damaged.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is not an empty folder; name another one")
    files = []
    for index in cache.shards:
        sink = pa.BufferOutputStream()
        pq.write_table(_joined(cache, index), sink, compression="zstd")
        files.append(out / "data" / shard_path(Path(), index).name)
        write_atomically(files[-1], sink.getvalue())
    write_atomically(out / "README.md", _card(cache).encode())
    return files


def _survey(source: _Source) -> tuple[list[str], dict[str, int], int]:
    """Check every row before anything is written: prompt id of each kept row, dropped rows, tokens."""
    prompts, num_tokens = [], 0
    for rollout, _ in _official_rows(source):
        prompts.append(rollout.prompt_id)
        num_tokens += len(rollout.response_ids)
    if not prompts:
        raise InputError(f"{source.parquet} has no row with response tokens; nothing can be imported")
    num_dropped = pq.read_metadata(source.parquet).num_rows - len(prompts)
    return prompts, {"empty response": num_dropped} if num_dropped else {}, num_tokens


def _official_rows(source: _Source) -> Iterator[tuple[Rollout, Scores]]:
    """Rows with a response, in the file's order; rows of one prompt are numbered."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(_read_rows(source.parquet)):
        if row["response_tokens"] is None or not len(row["response_tokens"]):
            continue
        where = f"{source.parquet} row {number}"
        prompt_ids = _prompt_ids(where, row, source.encode_prompt)
        _check_vocabulary(where, "prompt", prompt_ids, source.vocabulary_size)
        _check_vocabulary(where, "response", row["response_tokens"], source.vocabulary_size)
        prompt_id = hashlib.sha256(prompt_ids.astype("<i4").tobytes()).hexdigest()[:32]
        rollout, scores = _official_row(where, row, prompt_ids.astype(np.int32), prompt_id, seen[prompt_id])
        seen[prompt_id] += 1
        yield rollout, scores


def _read_rows(parquet: Path) -> Iterator[dict[str, Any]]:
    """Rows with `prompt` and the fields of `metadata`; lists as numpy arrays, None for what is missing."""
    try:
        with pq.ParquetFile(parquet) as file:
            _check_columns(parquet, file.schema_arrow)
            for batch in file.iter_batches(batch_size=64, columns=["prompt", "metadata"]):
                columns = {"prompt": batch.column("prompt").to_pylist(), **_metadata_columns(batch)}
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
    except (OSError, pa.ArrowException) as error:
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
        values = pc.struct_field(metadata, name)
        is_list = pa.types.is_list(kind)
        columns[name] = split_lists(pa.chunked_array([values.cast(kind)])) if is_list else values.to_pylist()
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


def _batched(rows: Iterator[tuple[Rollout, Scores]]) -> Iterator[list[tuple[Rollout, Scores]]]:
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
) -> tuple[Rollout, Scores]:
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
        loss_mask=np.ones(length, np.bool_)
        if mask is None
        else _floats(where, "loss_mask", mask, length) != 0,
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
    return rollout, Scores(logprobs, counts, no_entries, no_values, tails)


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


def _joined(cache: Cache, index: int) -> pa.Table:
    """A shard's rollouts with the columns of every signal beside them."""
    joined = read_columns(cache, index, ROLLOUTS.names)
    for name in cache.signals:
        table = read_columns(cache, index, SIGNALS.names, name)
        check_rollout_ids(cache.file(index, name), table.column("rollout_id"), joined.column("rollout_id"))
        for column in ("logprobs", "tail_logprobs"):
            joined = joined.append_column(f"{name}_{column}", table.column(column))
        for column in ("topk_ids", "topk_logprobs"):
            joined = joined.append_column(f"{name}_{column}", _nested(table, column))
    return joined.replace_schema_metadata(None)


def _nested(table: pa.Table, column: str) -> pa.Array:
    """Top-k entries as a list per token."""
    counts, offsets = flat_column(table.column("topk_counts"))
    values, _ = flat_column(table.column(column))
    flat = pa.array(values)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    inner = pa.ListArray.from_arrays(pa.array(starts), flat, type=list_of(flat.type))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), inner, type=list_of(inner.type))


def _card(cache: Cache) -> str:
    manifest, sampler = cache.manifest, cache.manifest.sampler
    name = f" ({sampler.source}, {sampler.identity})" if sampler else ""
    signals = "".join(
        f"- signal `{name}` ({signal.manifest.role}, top {signal.manifest.top_k}): `{name}_logprobs`, "
        f"`{name}_tail_logprobs`, `{name}_topk_ids`, `{name}_topk_logprobs`\n"
        for name, signal in cache.signals.items()
    )
    return CARD.format(
        rollouts=cache.num_rollouts,
        tokens=cache.num_tokens,
        version=__version__,
        origin=f"{manifest.origin}{name}",
        proof=manifest.sft.proof,
        signals=signals,
    )
