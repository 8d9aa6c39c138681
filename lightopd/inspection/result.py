"""A query's result, as Arrow, pandas, Polars, rows, or a table in a notebook."""

import html
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lightopd.errors import ConfigError
from lightopd.text_tables import cell, table_lines

PREVIEW_ROWS = 20
"""Rows that a notebook or a prompt shows of a result."""

Stream = Callable[[], AbstractContextManager[pa.RecordBatchReader]]


@dataclass(frozen=True, slots=True)
class Result:
    """One query over a cache; nothing runs until its rows are asked for, and each call runs it anew."""

    stream: Stream
    """Runs the query and gives its rows batch by batch."""

    def arrow(self) -> pa.Table:
        """All rows as an Arrow table."""
        with self.stream() as reader:
            return reader.read_all()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows as Arrow record batches, as they come; memory stays at one batch."""
        with self.stream() as reader:
            yield from reader

    def rows(self) -> list[dict[str, Any]]:
        """All rows as dicts."""
        found: list[dict[str, Any]] = self.arrow().to_pylist()
        return found

    def df(self) -> Any:
        """All rows as a pandas data frame.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            return self.arrow().to_pandas()
        except ImportError:
            raise ConfigError("df() needs pandas, which is not installed; pip install pandas") from None

    def pl(self) -> Any:
        """All rows as a Polars data frame.

        Raises:
            ConfigError: Polars is not installed.
        """
        try:
            import polars
        except ImportError:
            raise ConfigError("pl() needs Polars, which is not installed; pip install polars") from None
        return polars.from_arrow(self.arrow())

    def preview(self) -> tuple[list[str], list[list[Any]], bool]:
        """Columns, the first rows, and whether there are more."""
        rows: list[list[Any]] = []
        with self.stream() as reader:
            columns: list[str] = reader.schema.names
            for batch in reader:
                few = batch.slice(0, PREVIEW_ROWS + 1 - len(rows))
                rows += map(list, zip(*(column.to_pylist() for column in few.columns), strict=True))
                if len(rows) > PREVIEW_ROWS:
                    break
        return columns, rows[:PREVIEW_ROWS], len(rows) > PREVIEW_ROWS

    def __repr__(self) -> str:
        columns, rows, has_more = self.preview()
        return "\n".join([*table_lines(columns, iter(rows)), *["..."] * has_more])

    def _repr_html_(self) -> str:
        columns, rows, has_more = self.preview()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        cells = [[f"<td>{html.escape(cell(value))}</td>" for value in row] for row in rows]
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        more = "<p>first rows only</p>" if has_more else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
