"""SQL over a cache: views on the Parquet files, and a fence around the cache folder.

Every `query` builds its views anew in an in-memory DuckDB, so it is right after a shard or a signal was
added and after the folder was moved. `index.duckdb` holds the same views, over paths relative to the cache
folder, for people who open the cache with DuckDB alone; it can be deleted and rebuilt.

The fence: DuckDB's access to files and the net is switched off and its configuration locked; the one thing it
can open is `cache://`, a file system that reads below the cache folder and cannot write. Statement types are
checked only for a better message, since a SELECT can hide a COPY in a common table expression.
"""

import json
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from lightopd.cache.buckets.mirrors import mirror_of
from lightopd.cache.contexts import open_text, text_folder, text_names, text_shards
from lightopd.cache.fence import ReadOnlyFolder
from lightopd.cache.manifests import read_manifest, rollouts_folder, signal_folder, signal_names
from lightopd.cache.shards import shard_path
from lightopd.cache.store import Cache, Signal, open_cache
from lightopd.errors import CacheError, ConfigError, LightopdError
from lightopd.files import output_error, write_atomically
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
from lightopd.stopping import LISTEN_S, result_of, undisturbed

log = logging.getLogger(__name__)

INDEX = "index.duckdb"
VIEWS = ("rollouts", "tokens", "topk", "signals", "texts", "branches", "lineage")
READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
"""Statements that only read; a PIVOT is MULTI."""

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

Value = TypeVar("Value")


def query(path: Path, sql: str) -> pa.Table:
    """Run one reading SQL statement over a cache's views and return the result.

    Args:
        path: a cache folder; shards that are not there yet are left out.
        sql: one SELECT (or FROM, WITH, DESCRIBE, SUMMARIZE, SHOW, PIVOT, EXPLAIN) over `VIEWS`.

    Raises:
        ConfigError: the SQL is wrong, changes something, or reaches outside the cache folder.
        CacheError: the folder is not a cache, or a file of it is damaged.
    """
    check_reads(sql)
    with connect(open_cache(path, incomplete=True)) as connection:
        try:
            return stoppable(connection, lambda: connection.sql(sql).to_arrow_table())
        except duckdb.Error as error:
            raise told(error, path) from None


def build_index(cache: Cache) -> Path:
    """Write `index.duckdb` beside the manifest, anew, and return its path.

    Its views name files relative to the cache folder: open it from there, or set DuckDB's
    `file_search_path` to the folder. Rebuild it after a signal was added.

    Raises:
        OutputError: the file cannot be written.
    """
    path, search = cache.path / INDEX, {"file_search_path": str(cache.path.resolve())}
    try:
        # DuckDB keeps a log beside its file, which a full disk, or a kill, would leave in the cache.
        with tempfile.TemporaryDirectory(prefix="lightopd-index-") as scratch:
            made = Path(scratch) / INDEX
            with duckdb.connect(str(made), config=search) as connection:
                stoppable(connection, lambda: make_views(connection, cache, ""))
            content = made.read_bytes()
    except (OSError, duckdb.IOException) as error:
        raise output_error(error, path) from error
    write_atomically(path, content, shared=True)
    return path


def refresh_index(cache: Cache | Path) -> None:
    """Build the index at the end of a stage, which is done without it: a failure is a warning.

    Args:
        cache: opened with all its signals, or the folder of one that was not.
    """
    path = cache if isinstance(cache, Path) else cache.path
    if mirror_of(path) is not None:  # it would speak of files that come and go
        return
    try:
        build_index(open_cache(cache, incomplete=True) if isinstance(cache, Path) else cache)
    except (LightopdError, duckdb.Error) as error:
        log.warning("%s; `lightopd index %s` builds it later", str(error).splitlines()[0], path)


def stoppable(connection: duckdb.DuckDBPyConnection, call: Callable[[], Value]) -> Value:
    """What the call returns; Ctrl-C stops the query that it waits for.

    Python hears a signal between two of its own instructions only, and DuckDB's are none: the call runs in a
    thread of its own while this one listens.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; the query has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    with ThreadPoolExecutor(1) as pool:
        with undisturbed():
            future = pool.submit(call)
        try:
            return result_of(future)
        except KeyboardInterrupt:
            is_done = False
            while not is_done:
                connection.interrupt()
                with undisturbed():
                    is_done = bool(wait([future], timeout=LISTEN_S).done)
            raise


@contextmanager
def connect(
    cache: Cache, limits: Mapping[str, str | int] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory DuckDB with the cache's views, behind the fence.

    Args:
        cache: opened; shards that are not there are left out.
        limits: DuckDB's settings of memory and threads, such as `memory_limit` and `threads`.

    Raises:
        CacheError: a file of the cache cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="lightopd-sql-") as spill:
        settings = {
            "temp_directory": spill,
            "python_enable_replacements": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            **(limits or {}),
        }
        with duckdb.connect(":memory:", config=settings) as connection:
            connection.register_filesystem(ReadOnlyFolder(cache.path))
            try:
                stoppable(connection, lambda: make_views(connection, cache, "cache://"))
            except duckdb.Error as error:
                raise _unreadable(error, cache.path) from None
            connection.execute("SET allowed_directories = ['cache://']")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            yield connection


def make_views(connection: duckdb.DuckDBPyConnection, cache: Cache, prefix: str) -> None:
    """Create the raw views and tables, then those of views.sql; `prefix` stands before every path."""
    rollouts = [shard_path(rollouts_folder(Path()), index) for index in cache.shards]
    signals = {
        name: [f"{prefix}{shard_path(signal_folder(Path(), name), index)}" for index in signal.shards]
        for name, signal in cache.signals.items()
    }
    place = "regexp_extract(filename, 'part-(\\d+)', 1)::INTEGER AS shard, file_row_number AS row_in_shard"
    name = "regexp_extract(filename, 'signals/([^/]+)/', 1) AS signal"
    older = "".join(f", NULL::FLOAT[] AS {name}" for name in _newer_columns(cache))
    shards = [[f"{prefix}{file}" for file in rollouts]]
    _raw_view(connection, "raw_rollouts", shards, place + older, ROLLOUTS)
    _raw_view(connection, "raw_signals", list(signals.values()), f"{name}, {place}", SIGNALS)
    _text_views(connection, cache, prefix, place)
    _table(
        connection,
        "raw_manifests",
        RAW_MANIFESTS,
        [_signal_row(cache, item) for item in cache.signals.values()],
    )
    _table(connection, "raw_lineage", RAW_LINEAGE, list(_lineage_rows(cache.path)))
    connection.execute((files("lightopd.schemas") / "sql" / "views.sql").read_text())


def _newer_columns(cache: Cache) -> list[str]:
    """Columns of rollouts that the cache's files are too old to have."""
    there = schema_of(Rollout, cache.manifest.schema_version).names if cache.shards else ROLLOUTS.names
    return [name for name in ROLLOUTS.names if name not in there]


def _text_views(connection: duckdb.DuckDBPyConnection, cache: Cache, prefix: str, place: str) -> None:
    """`raw_texts` over all text columns, `raw_branches` over those of branched rollouts."""
    files: dict[str, list[list[str]]] = {"raw_texts": [], "raw_branches": []}
    for name in text_names(cache.path):
        paths = [f"{prefix}{file}" for file in text_shards(cache, name)]
        files["raw_texts"].append(paths)
        if open_text(cache, name).branches is not None:
            files["raw_branches"].append(paths)
    column = "regexp_extract(filename, 'texts/([^/]+)/', 1) AS name"
    for view, schema in (("raw_texts", TEXTS), ("raw_branches", BRANCHES)):
        _raw_view(connection, view, files[view], f"{column}, {place}", schema)


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
    files = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    names = ", ".join(f"'{name}'" for name in schema.names)
    source = f"read_parquet([{files}], filename = true, file_row_number = true)"
    return f"SELECT COLUMNS(lambda name: name IN ({names})), {extra} FROM {source}"


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


def check_reads(sql: str) -> None:
    """Refuse what is not one statement that reads.

    Raises:
        ConfigError: the SQL cannot be parsed, holds several statements or none, or changes something.
    """
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise ConfigError(f"the SQL cannot be parsed: {_first_line(error)}") from None
    if len(statements) != 1:
        raise ConfigError(f"one SQL statement is needed, {len(statements)} were found; run them one by one")
    if statements[0].type not in READING:
        raise ConfigError(
            f"{statements[0].type.name} is refused: SQL over a cache only reads; write a result with --out"
        )


def told(error: duckdb.Error, path: Path) -> CacheError | ConfigError:
    """DuckDB's complaint as one line: about the cache's files, or about the SQL."""
    line = _first_line(error)
    if isinstance(error, duckdb.PermissionException) or "PermissionError" in line:
        return ConfigError(f"the SQL reaches outside the cache, which is refused: {line}")
    if isinstance(error, duckdb.IOException | duckdb.SerializationException) or ".parquet" in line:
        return _unreadable(error, path)
    return ConfigError(f"the SQL cannot be run: {_sentences(error)}")


def _unreadable(error: duckdb.Error, path: Path) -> CacheError:
    return CacheError(f"{path} cannot be read: {_first_line(error)}; run `lightopd verify {path}`")


def _first_line(error: duckdb.Error) -> str:
    """The sentence of a DuckDB message; of a Python traceback in it, the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _sentences(error: duckdb.Error) -> str:
    """A DuckDB message in one line, its suggestions kept; the picture of the place in the SQL left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    if lines[0].startswith("Traceback"):
        return lines[-1]
    return " ".join(line for line in lines if not re.match(r"LINE \d+:", line))
