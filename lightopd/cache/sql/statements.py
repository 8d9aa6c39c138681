"""Which SQL a cache answers, and DuckDB's complaints as one line of ours."""

import re
from pathlib import Path

import duckdb

from lightopd.errors import CacheError, ConfigError

READING = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI)
"""Statements that only read; a PIVOT is MULTI."""


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
        return unreadable(error, path)
    return ConfigError(f"the SQL cannot be run: {_sentences(error)}")


def unreadable(error: duckdb.Error, path: Path) -> CacheError:
    """DuckDB's complaint about a cache's files as one line."""
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
