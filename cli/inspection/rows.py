"""A query's rows on the screen or in a file: table, Markdown, CSV, JSON lines or Parquet, as they come."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from lightopd.text_tables import cell, table_lines

if TYPE_CHECKING:
    import pyarrow as pa


def write_rows(reader: "pa.RecordBatchReader", format: str, out: Path | None) -> int:
    """Write the rows and return their number.

    Args:
        reader: of the rows.
        format: one of `FORMATS`.
        out: file, which is there whole or not at all; None is stdout.

    Raises:
        ConfigError: the format is not known, or Parquet is asked for on the screen.
        OutputError: the file could not be written.
    """
    from lightopd.errors import ConfigError
    from lightopd.files import output_error, replaced_file, stream_kind

    if format not in FORMATS:
        raise ConfigError(f"--format {format} is not known; use {', '.join(FORMATS)}")
    if format == "parquet" and out is None:
        raise ConfigError("--format parquet needs --out FILE")
    if out is None or stream_kind(out):
        return FORMATS[format](reader, out)
    try:
        with replaced_file(out.resolve()) as part:
            return FORMATS[format](reader, part)
    except OSError as error:
        if error.errno is None:  # Arrow's, of the query
            raise
        raise output_error(error, out) from error


def rows_of(reader: "pa.RecordBatchReader") -> Iterator[list[Any]]:
    """Rows as lists, in the order of the columns."""
    for batch in reader:
        yield from map(list, zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _table(reader: "pa.RecordBatchReader", out: Path | None) -> int:
    room = shutil.get_terminal_size().columns if out is None and sys.stdout.isatty() else None
    with _text(out) as file:
        lines = list_count(table_lines(reader.schema.names, rows_of(reader), room), file)
    return lines - 2


def _markdown(reader: "pa.RecordBatchReader", out: Path | None) -> int:
    def lines() -> Iterator[str]:
        yield _markdown_line([cell(name, None) for name in reader.schema.names])
        yield _markdown_line(["---"] * len(reader.schema.names))
        for row in rows_of(reader):
            yield _markdown_line([cell(value, None) for value in row])

    with _text(out) as file:
        return list_count(lines(), file) - 2


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _json(reader: "pa.RecordBatchReader", out: Path | None) -> int:
    names = reader.schema.names
    with _text(out) as file:
        return list_count(
            (json.dumps(dict(zip(names, row, strict=True)), default=str) for row in rows_of(reader)), file
        )


def _csv(reader: "pa.RecordBatchReader", out: Path | None) -> int:
    import pyarrow as pa
    import pyarrow.csv

    from lightopd.text_tables import visible

    is_shown = out is None and sys.stdout.isatty()
    fields = [
        pa.field(
            visible(field.name) if is_shown else field.name,
            pa.string() if pa.types.is_nested(field.type) else field.type,
        )
        for field in reader.schema
    ]
    schema, count = pa.schema(fields), 0
    with pyarrow.csv.CSVWriter(out or sys.stdout.buffer, schema) as writer:
        for batch in reader:
            columns = [_flat(column, is_shown) for column in batch.columns]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += batch.num_rows
    return count


def _flat(column: "pa.Array", is_shown: bool) -> "pa.Array":
    """Nested values as JSON text, since CSV has no lists; text for a terminal without control characters."""
    import pyarrow as pa

    from lightopd.text_tables import visible

    if pa.types.is_nested(column.type):
        write: Callable[[Any], str] = functools.partial(json.dumps, default=str)
    elif is_shown and pa.types.is_string(column.type):
        write = visible
    else:
        return column
    return pa.array([None if value is None else write(value) for value in column.to_pylist()], pa.string())


def _parquet(reader: "pa.RecordBatchReader", out: Path | None) -> int:
    import pyarrow.parquet

    assert out is not None
    count = 0
    with pyarrow.parquet.ParquetWriter(out, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def list_count(lines: Iterator[str], file: TextIO) -> int:
    """Write the lines and return their number."""
    count = 0
    for line in lines:
        typer.echo(line, file=file)
        count += 1
    return count


@contextmanager
def _text(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
        return
    with out.open("w", encoding="utf-8") as file:
        yield file


FORMATS: dict[str, Callable[["pa.RecordBatchReader", Path | None], int]] = {
    "table": _table,
    "markdown": _markdown,
    "csv": _csv,
    "json": _json,
    "parquet": _parquet,
}
