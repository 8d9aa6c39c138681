"""Views over a cache's Parquet files: the raw ones here, those that people read in `schemas/sql/views.sql`.

Row i of a signal's shard speaks of row i of the rollout shard of that number, so the two are read side by
side (`POSITIONAL JOIN`): DuckDB holds a batch of rows of both, where a join by key would hold one side whole.
"""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from lightopd.cache.contexts import open_text, text_folder, text_names, text_shards
from lightopd.cache.manifests import read_manifest, rollouts_folder, signal_folder, signal_names
from lightopd.cache.shards import shard_path
from lightopd.cache.store import Cache, Signal
from lightopd.schemas.base import StrictModel
from lightopd.schemas.cache import ROLLOUTS, SIGNALS, schema_of
from lightopd.schemas.manifest import (
    CACHE_MANIFEST,
    SIGNAL_MANIFEST,
    TEXT_MANIFEST,
    CacheManifest,
    SignalManifest,
    TextManifest,
)
from lightopd.schemas.records import Rollout
from lightopd.schemas.rewriting import BRANCHES, TEXTS

RAW_MANIFESTS = pa.schema(
    [
        ("name", pa.string()),
        ("role", pa.string()),
        ("model", pa.string()),
        ("model_source", pa.string()),
        ("top_k", pa.int64()),
        ("min_probability", pa.float64()),
        ("topk_dtype", pa.string()),
        ("tail", pa.string()),
        ("tail_shape_sha256", pa.string()),
        ("tail_shape_tokens", pa.int64()),
        ("horizon", pa.float64()),
        ("keeps", pa.string()),
        ("hidden_size", pa.int64()),
        ("hidden_format", pa.string()),
        ("shards", pa.int64()),
        ("num_shards", pa.int64()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
    ]
)
RAW_LINEAGE = pa.schema([("file", pa.string()), ("key", pa.string()), ("value", pa.string())])

PIECES = 8
"""Parts of a signal that are read at the same time: one thread reads a `POSITIONAL JOIN`."""

_PLACE = "regexp_extract(filename, 'part-(\\d+)', 1)::INTEGER AS shard, file_row_number AS row_in_shard"
_OF_SIGNAL = {
    "signal_logprobs": ("logprobs", "FLOAT[]"),
    "tail_logprobs": ("tail_logprobs", "FLOAT[]"),
    "topk_counts": ("topk_counts", "INTEGER[]"),
}
"""Columns of `raw_pairs` from a signal's files: its name there, and its type."""


def make_views(connection: duckdb.DuckDBPyConnection, cache: Cache, prefix: str) -> None:
    """Create the raw views and tables, then those of views.sql; `prefix` stands before every path."""
    signals = [_paths(signal_folder(Path(), name), prefix, s.shards) for name, s in cache.signals.items()]
    name = "regexp_extract(filename, 'signals/([^/]+)/', 1) AS signal"
    rollouts = [_paths(rollouts_folder(Path()), prefix, cache.shards)]
    _raw_view(connection, "raw_rollouts", rollouts, _rollout_place(cache), ROLLOUTS)
    _raw_view(connection, "raw_signals", signals, f"{name}, {_PLACE}", SIGNALS)
    _pairs_view(connection, cache, prefix)
    _text_views(connection, cache, prefix)
    _table(
        connection,
        "raw_manifests",
        RAW_MANIFESTS,
        [_signal_row(cache, item) for item in cache.signals.values()],
    )
    _table(connection, "raw_lineage", RAW_LINEAGE, list(_lineage_rows(cache.path)))
    connection.execute((files("lightopd.schemas") / "sql" / "views.sql").read_text())


def _paths(folder: Path, prefix: str, shards: Sequence[int]) -> list[str]:
    return [f"{prefix}{shard_path(folder, index)}" for index in shards]


def _pairs_view(connection: duckdb.DuckDBPyConnection, cache: Cache, prefix: str) -> None:
    """`raw_pairs`: a rollout beside each signal's lists by token; alone where no signal speaks of it."""
    alone, selects = {*cache.shards}, []
    for name, signal in cache.signals.items():
        both = sorted({*cache.shards} & {*signal.shards})
        alone -= {*both}
        step = max(1, -(-len(both) // PIECES))
        pieces = [both[start : start + step] for start in range(0, len(both), step)]
        selects += [_pairs_of(cache, name, prefix, piece) for piece in pieces]
    if alone or not selects:
        empty = ", ".join(f"NULL::{kind} AS {name}" for name, (_, kind) in _OF_SIGNAL.items())
        rollouts = _rollouts_of(cache, prefix, sorted(alone)) if alone else "FROM raw_rollouts"
        selects.append(f"SELECT *, NULL::VARCHAR AS signal, {empty} FROM ({rollouts})")
    connection.execute(f"CREATE VIEW raw_pairs AS {' UNION ALL BY NAME '.join(selects)}")


def _pairs_of(cache: Cache, signal: str, prefix: str, shards: list[int]) -> str:
    """Shards of rollouts and of a signal row by row; rows of two rollouts in one place are an error."""
    theirs = _paths(signal_folder(Path(), signal), prefix, shards)
    columns = ", ".join(f"s.{own} AS {name}" for name, (own, _) in _OF_SIGNAL.items())
    told = f"coalesce(s.filename, {_quoted(theirs[-1])}) || ' has other rows than its rollouts'"
    return f"""SELECT r.*, {_quoted(signal)} AS signal, {columns}
        FROM ({_rollouts_of(cache, prefix, shards)}) AS r
        POSITIONAL JOIN ({_select_from(theirs, "filename", SIGNALS)}) AS s
        WHERE CASE WHEN r.rollout_id = s.rollout_id THEN true ELSE error({told}) END"""


def _rollouts_of(cache: Cache, prefix: str, shards: Sequence[int]) -> str:
    paths = _paths(rollouts_folder(Path()), prefix, shards)
    return _select_from(paths, _rollout_place(cache), ROLLOUTS)


def _rollout_place(cache: Cache) -> str:
    """Where a rollout lies, and null for the columns that the cache's files are too old to have."""
    there = schema_of(Rollout, cache.manifest.schema_version).names if cache.shards else ROLLOUTS.names
    return _PLACE + "".join(f", NULL::FLOAT[] AS {name}" for name in ROLLOUTS.names if name not in there)


def _text_views(connection: duckdb.DuckDBPyConnection, cache: Cache, prefix: str) -> None:
    """`raw_texts` over all text columns, `raw_branches` over those of branched rollouts."""
    files: dict[str, list[list[str]]] = {"raw_texts": [], "raw_branches": []}
    for name in text_names(cache.path):
        paths = [f"{prefix}{file}" for file in text_shards(cache, name)]
        files["raw_texts"].append(paths)
        if open_text(cache, name).branches is not None:
            files["raw_branches"].append(paths)
    column = "regexp_extract(filename, 'texts/([^/]+)/', 1) AS name"
    for view, schema in (("raw_texts", TEXTS), ("raw_branches", BRANCHES)):
        _raw_view(connection, view, files[view], f"{column}, {_PLACE}", schema)


def _raw_view(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    folders: list[list[str]],
    extra: str,
    schema: pa.Schema,
) -> None:
    """A view of the columns that the schema names, and where each row lies; without files, no rows.

    The shards of one folder have the columns of its first, so that no other is opened before it is read;
    those of two folders may differ, and a column that one lacks is null there.
    """
    selects = [_select_from(paths, extra, schema) for paths in folders if paths]
    if selects:
        connection.execute(f"CREATE VIEW {name} AS {' UNION ALL BY NAME '.join(selects)}")
        return
    empty = schema.append(pa.field("filename", pa.string())).append(pa.field("file_row_number", pa.int64()))
    connection.register("empty_rows", empty.empty_table())
    connection.execute(
        f"CREATE TABLE {name} AS SELECT * EXCLUDE (filename, file_row_number), {extra} FROM empty_rows"
    )
    connection.unregister("empty_rows")


def _select_from(paths: list[str], extra: str, schema: pa.Schema) -> str:
    files = ", ".join(map(_quoted, paths))
    names = ", ".join(f"'{name}'" for name in schema.names)
    source = f"read_parquet([{files}], filename = true, file_row_number = true)"
    return f"SELECT COLUMNS(lambda name: name IN ({names})), {extra} FROM {source}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _table(
    connection: duckdb.DuckDBPyConnection, name: str, schema: pa.Schema, rows: list[dict[str, Any]]
) -> None:
    connection.register("given_rows", pa.Table.from_pylist(rows, schema=schema))
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM given_rows")
    connection.unregister("given_rows")


def _signal_row(cache: Cache, signal: Signal) -> dict[str, Any]:
    manifest = signal.manifest
    return {
        **{
            name: getattr(manifest, name)
            for name in ("name", "role", "top_k", "min_probability", "topk_dtype")
        },
        "model": manifest.model.identity if manifest.model else None,
        "model_source": manifest.model.source if manifest.model else None,
        "tail": manifest.tail,
        "tail_shape_sha256": manifest.tail_shape.sha256 if manifest.tail_shape else None,
        "tail_shape_tokens": manifest.tail_shape.tokens if manifest.tail_shape else None,
        "horizon": manifest.horizon,
        "keeps": manifest.keeps.kind,
        "hidden_size": manifest.hidden.size if manifest.hidden else None,
        "hidden_format": manifest.hidden.format if manifest.hidden else None,
        "shards": len(signal.shards),
        "num_shards": cache.manifest.num_shards,
        "rows": sum(marker.rows for marker in signal.markers),
        "tokens": sum(marker.tokens for marker in signal.markers),
        "bytes": sum(marker.size_bytes for marker in signal.markers),
    }


def _lineage_rows(path: Path) -> Iterator[dict[str, Any]]:
    yield from _manifest_rows(CACHE_MANIFEST, read_manifest(path / CACHE_MANIFEST, CacheManifest))
    for name in signal_names(path):
        file = signal_folder(path, name) / SIGNAL_MANIFEST
        yield from _manifest_rows(str(file.relative_to(path)), read_manifest(file, SignalManifest))
    for name in text_names(path):
        file = text_folder(path, name) / TEXT_MANIFEST
        yield from _manifest_rows(str(file.relative_to(path)), read_manifest(file, TextManifest))


def _manifest_rows(file: str, manifest: StrictModel) -> Iterator[dict[str, Any]]:
    for key, value in _leaves(manifest.model_dump(mode="json"), ""):
        text = value if isinstance(value, str) or value is None else json.dumps(value)
        yield {"file": file, "key": key, "value": text}


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Fields of nested JSON with dotted names; items of lists are numbered from 0."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    nested = [
        leaf for name, item in children for leaf in _leaves(item, f"{key}.{name}" if key else str(name))
    ]
    yield from nested or [(key, value)]
