"""SQL over a cache: views on the Parquet files, and a fence around the cache folder.

Every `query` builds its views anew in an in-memory DuckDB, so it is right after a shard or a signal was
added and after the folder was moved. `index.duckdb` holds the same views, over paths relative to the cache
folder, for people who open the cache with DuckDB alone; it can be deleted and rebuilt.

The fence: DuckDB's access to files and the net is switched off and its configuration locked; the one thing it
can open is `cache://`, a file system that reads below the cache folder and cannot write. Statement types are
checked only for a better message, since a SELECT can hide a COPY in a common table expression.
"""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa

from lightopd.cache.buckets.mirrors import mirror_of
from lightopd.cache.sql.fence import ReadOnlyFolder
from lightopd.cache.sql.statements import check_reads, told, unreadable
from lightopd.cache.sql.views import make_views
from lightopd.cache.store import Cache, open_cache
from lightopd.errors import LightopdError
from lightopd.files import output_error, write_atomically
from lightopd.stopping import LISTEN_S, result_of, undisturbed

log = logging.getLogger(__name__)

INDEX = "index.duckdb"
VIEWS = ("rollouts", "tokens", "topk", "signals", "texts", "branches", "lineage")
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
            if mirror_of(cache.path) is None:  # else a megabyte of each column in each row group
                connection.execute("SET disable_parquet_prefetching = true")
            try:
                stoppable(connection, lambda: make_views(connection, cache, "cache://"))
            except duckdb.Error as error:
                raise unreadable(error, cache.path) from None
            connection.execute("SET allowed_directories = ['cache://']")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            yield connection
