"""Five column layouts for the teacher's top-k, and tokens to put into them; measured by `layout.py`."""

# N = tokens of all rollouts, K = cached teacher tokens; nats throughout

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.dlpack import from_dlpack

TOKENS_PER_ROLLOUT = 256
NUM_TOKENS = 32_768
ROWS_PER_GROUP = 16
SPLIT = "BYTE_STREAM_SPLIT"
NAMES = ("topk_ids", "topk_logprobs")
Pair = tuple[torch.Tensor, torch.Tensor]

SQL_NESTED = """
    with t as (select rollout_id, generate_subscripts(topk_ids, 1) - 1 as position,
                      unnest(topk_ids) as ids, unnest(topk_logprobs) as logprobs from shard)
    select rollout_id, position, generate_subscripts(ids, 1) - 1 as rank,
           unnest(ids) as token_id, unnest(logprobs) as logprob from t"""
SQL_TOKEN_ROWS = """
    select rollout_id, position, generate_subscripts(topk_ids, 1) - 1 as rank,
           unnest(topk_ids) as token_id, unnest(topk_logprobs) as logprob from shard"""
SQL_RANK_COLUMNS = """
    select rollout_id, position, unnest(range({top_k})) as rank,
           unnest([{ids}]) as token_id, unnest([{logprobs}]) as logprob from shard"""
# DuckDB has no cast from bytes to float16, so sign, exponent and mantissa are put together by hand.
SQL_BINARY = """
    with e as (select rollout_id, unnest(range(octet_length(topk_ids) // 4)) as i,
                      unnest(regexp_extract_all(hex(topk_ids), '.{{8}}')) as h,
                      unnest(regexp_extract_all(hex(topk_logprobs), '.{{4}}')) as g from shard),
    b as (select rollout_id, i, ('0x' || h[7:8] || h[5:6] || h[3:4] || h[1:2])::int as token_id,
                 ('0x' || g[3:4] || g[1:2])::int as bits from e)
    select rollout_id, i // {top_k} as position, i % {top_k} as rank, token_id,
           case when (bits >> 10) & 31 = 0 then -(bits & 1023) * power(2.0, -24)
                else -(1 + (bits & 1023) / 1024) * power(2.0, ((bits >> 10) & 31) - 15)
           end as logprob from b"""
SQL_FLAT = """
    select rollout_id,
           unnest(flatten(list_transform(topk_counts, lambda n, i: repeat([i - 1], n)))) as position,
           unnest(flatten(list_transform(topk_counts, lambda n: range(n)))) as rank,
           unnest(topk_ids) as token_id, unnest(topk_logprobs) as logprob from shard"""


@dataclass(frozen=True, slots=True)
class Capture:
    """Top-k of N tokens, best first: ids_NK int32, logprobs_NK and tail_N (mass outside) float32."""

    ids_NK: np.ndarray
    logprobs_NK: np.ndarray
    tail_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Layout:
    """How one candidate is written, read back into flat ids and logprobs, and unnested by DuckDB."""

    name: str
    build: Callable[[Capture], pa.Table]
    split: list[str]
    decode: Callable[[pa.Table], Pair]
    rows_per_group: int
    sql: str


def synthetic_capture(vocab: int, top_k: int) -> Capture:
    """A capture that compresses like SmolLM2-135M's top-k on its own rollouts (within 6 %, k = 8 to 64).

    Log-probabilities are order statistics of V exponentials (Renyi's representation) times a temperature
    per token, so the spectrum is a power law; ids follow a power law over the vocabulary.
    """
    rng = np.random.default_rng(0)
    temperature_N1 = rng.lognormal(0.55, 0.35, (NUM_TOKENS, 1)).clip(1.05)
    steps_NK = rng.exponential(1.0, (NUM_TOKENS, top_k)) / np.arange(1, top_k + 1)
    logits_NK = -temperature_N1 * (np.cumsum(steps_NK, axis=1) - steps_NK[:, :1])
    slope_N1 = temperature_N1 - 1
    rest_N1 = np.exp(logits_NK[:, -1:]) * top_k / slope_N1 * (1 - (vocab / top_k) ** -slope_N1)
    total_N1 = np.exp(logits_NK).sum(axis=1, keepdims=True) + rest_N1
    tail_N = np.log(rest_N1 / total_N1)[:, 0]
    logprobs_NK = logits_NK - np.log(total_N1)
    return Capture(_ids(rng, vocab, top_k), logprobs_NK.astype(np.float32), tail_N.astype(np.float32))


def _ids(rng: np.random.Generator, vocab: int, top_k: int) -> np.ndarray:
    """Heavy-tailed ids in random order, no id twice at one position."""
    draws_NK = ((vocab - top_k) * rng.random((NUM_TOKENS, top_k)) ** 3.5).astype(np.int32)
    ranks_K = np.arange(top_k, dtype=np.int32)
    ascending_NK = np.maximum.accumulate(np.sort(draws_NK, axis=1) - ranks_K, axis=1) + ranks_K
    return rng.permuted(ascending_NK, axis=1)


def load_capture(path: Path, top_k: int) -> Capture:
    """Read `ids` (N, >= K) and `logprobs` (N, >= K, best first) from an npz file and cut them to K."""
    with np.load(path) as arrays:
        ids_NK = np.ascontiguousarray(arrays["ids"][:, :top_k], dtype=np.int32)
        logprobs_NK = np.ascontiguousarray(arrays["logprobs"][:, :top_k], dtype=np.float32)
    tail_N = np.log1p(-np.exp(logprobs_NK.astype(np.float64)).sum(axis=1).clip(max=1 - 1e-9))
    return Capture(ids_NK, logprobs_NK, tail_N.astype(np.float32))


def round_to_half(logprobs: np.ndarray) -> np.ndarray:
    """Round float32 values to the nearest float16 value, still as float32."""
    rounded: np.ndarray = torch.from_numpy(logprobs).half().float().numpy()
    return rounded


def to_list_column(offsets: np.ndarray, values: np.ndarray | pa.Array) -> pa.ListArray:
    items = values if isinstance(values, pa.Array) else pa.array(values)
    field = pa.field("element", items.type, nullable=False)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, type=pa.list_(field))


def rollout_bounds(num_tokens: int, width: int = 1) -> np.ndarray:
    """Offsets of the rollouts in a flat array that has `width` values per token."""
    return np.append(np.arange(0, num_tokens, TOKENS_PER_ROLLOUT), num_tokens) * width


def _rollout_ids(num_tokens: int) -> list[str]:
    rows = range(-(-num_tokens // TOKENS_PER_ROLLOUT))
    return [hashlib.sha256(str(row).encode()).hexdigest()[:32] for row in rows]


def _per_rollout(capture: Capture) -> dict[str, pa.Array]:
    num, top_k = capture.ids_NK.shape
    counts = to_list_column(rollout_bounds(num), np.full(num, top_k, dtype=np.int32))
    tail = to_list_column(rollout_bounds(num), capture.tail_N)
    return {"rollout_id": pa.array(_rollout_ids(num)), "tail_logprobs": tail, "topk_counts": counts}


def _per_token(capture: Capture) -> dict[str, pa.Array]:
    num = len(capture.ids_NK)
    rollout_ids = np.repeat(_rollout_ids(num), TOKENS_PER_ROLLOUT)[:num]
    position = pa.array((np.arange(num) % TOKENS_PER_ROLLOUT).astype(np.int32))
    return {"rollout_id": pa.array(rollout_ids), "position": position, "tail": pa.array(capture.tail_N)}


def _topk(capture: Capture) -> dict[str, np.ndarray]:
    return dict(zip(NAMES, (capture.ids_NK, round_to_half(capture.logprobs_NK)), strict=True))


def build_flat(capture: Capture) -> pa.Table:
    bounds = rollout_bounds(*capture.ids_NK.shape)
    flat = {name: to_list_column(bounds, values.ravel()) for name, values in _topk(capture).items()}
    return pa.table(_per_rollout(capture) | flat)


def build_nested(capture: Capture) -> pa.Table:
    num, top_k = capture.ids_NK.shape
    inner = np.arange(0, num * top_k + 1, top_k)
    nested = {
        n: to_list_column(rollout_bounds(num), to_list_column(inner, v.ravel()))
        for n, v in _topk(capture).items()
    }
    columns = _per_rollout(capture) | nested
    del columns["topk_counts"]
    return pa.table(columns)


def build_token_rows(capture: Capture) -> pa.Table:
    num, top_k = capture.ids_NK.shape
    inner = np.arange(0, num * top_k + 1, top_k)
    return pa.table(
        _per_token(capture) | {n: to_list_column(inner, v.ravel()) for n, v in _topk(capture).items()}
    )


def build_rank_columns(capture: Capture) -> pa.Table:
    columns = _per_token(capture)
    for name, values in _topk(capture).items():
        columns |= {f"{name}_{k}": pa.array(np.ascontiguousarray(row)) for k, row in enumerate(values.T)}
    return pa.table(columns)


def build_binary(capture: Capture) -> pa.Table:
    num, top_k = capture.ids_NK.shape
    columns = _per_rollout(capture)
    halves = capture.logprobs_NK.astype(np.float16)
    for name, values in zip(NAMES, (capture.ids_NK, halves), strict=True):
        offsets = pa.array(rollout_bounds(num, top_k * values.itemsize), pa.int32()).buffers()[1]
        buffers = [None, offsets, pa.py_buffer(values)]
        columns[name] = pa.Array.from_buffers(pa.binary(), len(columns["rollout_id"]), buffers)
    return pa.table(columns)


def _leaves(table: pa.Table, name: str, depth: int) -> torch.Tensor:
    """The innermost values of a list column, as a tensor over Arrow's own memory."""
    array = table.column(name).combine_chunks()
    for _ in range(depth):
        array = array.flatten()
    return from_dlpack(array)


def decode_lists(table: pa.Table, depth: int) -> Pair:
    return _leaves(table, NAMES[0], depth), _leaves(table, NAMES[1], depth)


def decode_rank_columns(table: pa.Table, top_k: int) -> Pair:
    columns = ([_leaves(table, f"{name}_{k}", 0) for k in range(top_k)] for name in NAMES)
    ids, logprobs = (torch.stack(column, dim=1).flatten() for column in columns)
    return ids, logprobs


def decode_binary(table: pa.Table) -> Pair:
    ids, halves = (table.column(name).combine_chunks().buffers()[2] for name in NAMES)
    logprobs = torch.from_numpy(np.frombuffer(halves, dtype=np.float16).copy()).float()
    return torch.from_numpy(np.frombuffer(ids, dtype=np.int32).copy()), logprobs


def layouts(top_k: int) -> list[Layout]:
    """The candidates; the chosen one, E, is first."""
    lists = [f"{name}.list.element" for name in NAMES]
    nested = [f"{name}.list.element" for name in lists]
    ids, logprobs = ([f"{name}_{k}" for k in range(top_k)] for name in NAMES)
    per_rank = SQL_RANK_COLUMNS.format(top_k=top_k, ids=", ".join(ids), logprobs=", ".join(logprobs))
    rank_decode = partial(decode_rank_columns, top_k=top_k)
    rows, tokens = ROWS_PER_GROUP, ROWS_PER_GROUP * TOKENS_PER_ROLLOUT
    return [
        Layout("E flat lists", build_flat, lists, partial(decode_lists, depth=1), rows, SQL_FLAT),
        Layout("A nested lists", build_nested, nested, partial(decode_lists, depth=2), rows, SQL_NESTED),
        Layout(
            "B row per token", build_token_rows, lists, partial(decode_lists, depth=1), tokens, SQL_TOKEN_ROWS
        ),
        Layout("C column per rank", build_rank_columns, ids + logprobs, rank_decode, tokens, per_rank),
        Layout("D binary", build_binary, [], decode_binary, rows, SQL_BINARY.format(top_k=top_k)),
    ]


def write(table: pa.Table, layout: Layout, path: Path, **changes: Any) -> None:
    """Write one shard with page checksums; `changes` replace single writer settings."""
    dictionaries = {"rollout_id": "rollout_id", "topk_counts": "topk_counts.list.element"}
    settings: dict[str, Any] = {
        "row_group_size": layout.rows_per_group,
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [leaf for name, leaf in dictionaries.items() if name in table.column_names],
        "column_encoding": dict.fromkeys(layout.split, SPLIT),
        "write_statistics": ["rollout_id"],
        "write_page_checksum": True,
    }
    pq.write_table(table, path, **settings | changes)


def read(
    path: Path, digest: str | None = None, page_checksums: bool = True, threads: bool = False
) -> pa.Table:
    """Read a shard's bytes once, check them, and parse Parquet from memory."""
    data = path.read_bytes()
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path} does not have the SHA-256 {digest}")
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=page_checksums) as file:
        return file.read(use_threads=threads)
