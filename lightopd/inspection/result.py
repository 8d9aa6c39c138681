"""A query's result, as Arrow, pandas, Polars, rows, or a table in a notebook."""

import html
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lightopd.errors import ConfigError
from lightopd.inspection.token_texts import visible

PREVIEW_ROWS = 20
"""Rows that a notebook or a prompt shows of a result."""
CELL_CHARACTERS = 60
"""Longest text that a preview shows in one cell."""

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

    def preview(self) -> tuple[list[str], list[list[str]], bool]:
        """Columns, the first rows as short text, and whether there are more."""
        rows: list[dict[str, Any]] = []
        with self.stream() as reader:
            columns: list[str] = reader.schema.names
            for batch in reader:
                rows += batch.slice(0, PREVIEW_ROWS + 1 - len(rows)).to_pylist()
                if len(rows) > PREVIEW_ROWS:
                    break
        cells = [[_cell(row[name]) for name in columns] for row in rows[:PREVIEW_ROWS]]
        return columns, cells, len(rows) > PREVIEW_ROWS

    def __repr__(self) -> str:
        columns, rows, has_more = self.preview()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [columns, *rows]
        ]
        return "\n".join([*lines, *(["..."] if has_more else [])])

    def _repr_html_(self) -> str:
        columns, rows, has_more = self.preview()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        more = "<p>first rows only</p>" if has_more else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else visible(str(value))
    return text if len(text) <= CELL_CHARACTERS else text[: CELL_CHARACTERS - 3] + "..."
