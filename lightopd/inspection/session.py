"""One fenced DuckDB over a cache and its runs: views, `decode(ids)`, `token(id)`, limits, and a way to stop.

Beside the cache's views there is the table `metrics` (run, step, name, value), empty where no run was named.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from lightopd.cache.index import connect, stoppable
from lightopd.cache.sql.statements import check_reads, told
from lightopd.cache.store import Cache
from lightopd.errors import CacheError, ConfigError
from lightopd.inspection.token_texts import TokenTexts

BATCH_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a query may take."""

    seconds: float | None = None
    """Longest time that it may run; None for no limit."""
    memory: str | None = None
    """Most memory, such as `4GB`; above it DuckDB spills to the disk. None takes DuckDB's own share."""

    def settings(self) -> dict[str, str | int]:
        """As DuckDB's settings."""
        return {} if self.memory is None else {"memory_limit": self.memory}


NO_LIMITS = Limits()


@contextmanager
def session(
    cache: Cache, texts: TokenTexts, metrics: pa.Table, limits: Limits = NO_LIMITS
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the cache's views, the metrics and the two functions; closed at the end.

    Raises:
        ConfigError: the memory limit is none that DuckDB knows.
        CacheError: a file of the cache cannot be read.
    """
    try:
        with connect(cache, limits.settings()) as connection:
            connection.register("given_metrics", metrics)
            connection.execute("CREATE TABLE metrics AS SELECT * FROM given_metrics")
            connection.unregister("given_metrics")
            _add_functions(connection, texts)
            yield connection
    except duckdb.InvalidInputException as error:
        if limits.memory is None:
            raise
        raise ConfigError(f"--memory {limits.memory} is not a size ({error}); write it as 4GB") from None
    except duckdb.ParserException as error:
        raise ConfigError(f"--memory {limits.memory} is not a size ({error}); write it as 4GB") from None


@contextmanager
def run(
    connection: duckdb.DuckDBPyConnection,
    cache: Cache,
    sql: str,
    values: Mapping[str, Any] | None = None,
    limits: Limits = NO_LIMITS,
) -> Iterator[pa.RecordBatchReader]:
    """Run one reading statement; its rows come batch by batch while the block lasts.

    Raises:
        ConfigError: the SQL is wrong, changes something, reaches outside the cache, lacks a parameter's
            value, or ran past a limit.
        CacheError: a file of the cache is damaged.
    """
    check_reads(sql)
    with _stopped_after(connection, limits.seconds) as is_late:
        try:
            with stoppable(connection, lambda: _reader(connection, sql, values or {})) as reader:
                yield _read_stoppably(connection, _named_apart(reader))
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of who writes the rows; Arrow's has no number
                raise
            if is_late.is_set():
                raise ConfigError(
                    f"the query ran longer than {limits.seconds:g} s and was stopped; narrow it, or raise "
                    "the time limit"
                ) from None
            if "Out of Memory Error" in str(error):
                most = limits.memory or "there is"
                raise ConfigError(
                    f"the query needs more memory than {most}; narrow it, or raise --memory"
                ) from None
            raise _one_line(error, cache) from None


def _reader(
    connection: duckdb.DuckDBPyConnection, sql: str, values: Mapping[str, Any]
) -> pa.RecordBatchReader:
    relation = connection.sql(sql, params=dict(values)) if values else connection.sql(sql)
    if relation is None:
        raise ConfigError("the SQL gives no rows")
    return relation.to_arrow_reader(BATCH_ROWS)


def _read_stoppably(
    connection: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader
) -> pa.RecordBatchReader:
    def batches() -> Iterator[pa.RecordBatch]:
        while (batch := stoppable(connection, lambda: next(reader, None))) is not None:
            yield batch

    return pa.RecordBatchReader.from_batches(reader.schema, batches())


def _named_apart(reader: pa.RecordBatchReader) -> pa.RecordBatchReader:
    """The reader with a number behind the names of columns that came before."""
    names: list[str] = reader.schema.names
    if len(set(names)) == len(names):
        return reader
    apart = [
        name if name not in names[:place] else f"{name}_{names[:place].count(name)}"
        for place, name in enumerate(names)
    ]
    schema = pa.schema([field.with_name(name) for field, name in zip(reader.schema, apart, strict=True)])
    batches = (pa.record_batch(batch.columns, schema=schema) for batch in reader)
    return pa.RecordBatchReader.from_batches(schema, batches)


def _one_line(error: Exception, cache: Cache) -> ConfigError | CacheError:
    """An error of DuckDB, or of DuckDB inside Arrow's stream, as one line."""
    if "INTERRUPT" in str(error) or isinstance(error, duckdb.InterruptException):
        raise KeyboardInterrupt
    if isinstance(error, duckdb.Error):
        return told(error, cache.path)
    return told(duckdb.Error(str(error)), cache.path)


@contextmanager
def _stopped_after(connection: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[threading.Event]:
    """Interrupts the connection's query when the time is over; the event says that it was."""
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        connection.interrupt()

    timer = threading.Timer(seconds, stop) if seconds is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield is_late
    finally:
        if timer is not None:
            timer.cancel()


def _add_functions(connection: duckdb.DuckDBPyConnection, texts: TokenTexts) -> None:
    def each(text: Callable[[Any], str]) -> Callable[[pa.Array], pa.Array]:
        return lambda ids: pa.array(
            [None if row is None else text(row) for row in ids.to_pylist()], pa.string()
        )

    settings = {"type": "arrow", "null_handling": "special"}
    connection.create_function("decode", each(texts.decode), ["INTEGER[]"], "VARCHAR", **settings)
    connection.create_function("token", each(texts.token), ["BIGINT"], "VARCHAR", **settings)
