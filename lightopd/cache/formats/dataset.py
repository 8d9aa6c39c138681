"""A cache as a plain dataset: Parquet with the signals beside the rollouts, and a dataset card."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightopd import __version__
from lightopd.cache.reader import read_columns
from lightopd.cache.row_checks import refuse_faults, rollout_faults, score_faults
from lightopd.cache.shards import shard_path
from lightopd.cache.signals.horizon import in_words
from lightopd.cache.store import Cache, Signal
from lightopd.cache.tables import flat_column
from lightopd.files import write_atomically
from lightopd.schemas.cache import ROLLOUTS, SIGNALS, list_of

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


def export_dataset(cache: Cache, out: Path) -> list[Path]:
    """Write a cache as plain Parquet with a dataset card; returns the Parquet files.

    One row per rollout, its signals beside it as `<signal>_logprobs`, `<signal>_tail_logprobs` (float32 per
    token), `<signal>_topk_ids` and `<signal>_topk_logprobs` (a list per token), up to the signal's horizon.
    `datasets` loads it by `load_dataset("parquet", data_files="OUT/data/*.parquet")`, or by the folder.

    Args:
        cache: opened with the signals that go along.
        out: folder with nothing of a dataset in it; a stop leaves a part of one.

    Raises:
        OutputError: `out` cannot be written.
        CacheError: a shard is damaged.
    """
    files, seen = [], set[str]()
    for index in cache.shards:
        sink = pa.BufferOutputStream()
        pq.write_table(_joined(cache, index, seen), sink, compression="zstd")
        files.append(out / "data" / shard_path(Path(), index).name)
        write_atomically(files[-1], sink.getvalue())
    write_atomically(out / "README.md", _card(cache).encode())
    return files


def _joined(cache: Cache, index: int, seen: set[str]) -> pa.Table:
    """A shard's rollouts with the columns of every signal beside them, every row checked."""
    rollouts = joined = read_columns(cache, index, ROLLOUTS.names)
    refuse_faults(cache.file(index), rollout_faults(rollouts, cache.manifest, seen))
    for name, signal in cache.signals.items():
        table = read_columns(cache, index, SIGNALS.names, name)
        faults = score_faults(table, rollouts, signal.manifest, cache.manifest.vocabulary_size)
        refuse_faults(cache.file(index, name), faults)
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


def _reach(signal: Signal) -> str:
    """What a signal with a horizon says of its lengths."""
    horizon = signal.manifest.horizon
    return "" if horizon is None else f"; of the {in_words(horizon)} of each response, no longer than that"


def _card(cache: Cache) -> str:
    manifest, sampler = cache.manifest, cache.manifest.sampler
    name = f" ({sampler.source}, {sampler.identity})" if sampler else ""
    signals = "".join(
        f"- signal `{name}` ({signal.manifest.role}, top {signal.manifest.top_k}): `{name}_logprobs`, "
        f"`{name}_tail_logprobs`, `{name}_topk_ids`, `{name}_topk_logprobs`"
        f"{'; its hidden states are left out' if signal.manifest.hidden else ''}{_reach(signal)}\n"
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
