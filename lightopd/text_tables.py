"""Values and tables as text for people: short cells, no control characters, aligned columns."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

MEASURED_ROWS = 1_000
"""Rows whose width the columns of a table follow; later rows may stick out."""
CELL_CHARACTERS = 60
"""Longest text in one cell."""
SHORTEST = 12
"""Characters to which a column may shrink."""

_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
"""Control characters, and those without width that move or hide others."""
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str) -> str:
    """The text with control, bidirectional and zero-width characters written as escapes."""
    return _HIDDEN.sub(lambda found: _SHORT.get(found[0], f"\\u{ord(found[0]):04x}"), text)


def cell(value: Any, longest: int | None = CELL_CHARACTERS) -> str:
    """A value for a person: four significant digits, no control characters, cut when long."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "-"
    text = json.dumps(value, default=str) if isinstance(value, list | dict) else str(value)
    return visible(text) if longest is None else _cut(visible(text), longest)


def table_lines(
    columns: Sequence[str], rows: Iterator[Sequence[Any]], room: int | None = None
) -> Iterator[str]:
    """Aligned lines: names, a rule, then the rows; numbers to the right.

    Args:
        columns: their names.
        rows: values in the order of the columns.
        room: characters of a line; the widest column shrinks until all fit. None for as many as it takes.
    """
    columns = [cell(name) for name in columns]
    first = list(islice(rows, MEASURED_ROWS))
    cells = [[cell(value) for value in row] for row in first]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    while room and sum(widths) + 2 * (len(widths) - 1) > room and max(widths) > SHORTEST:
        widths[widths.index(max(widths))] -= 1
    is_number = [
        bool(first) and all(isinstance(row[place], int | float | None) for row in first)
        for place in range(len(columns))
    ]

    def line(texts: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, is_number, strict=True)
        ]
        return "  ".join(parts).rstrip()

    later = ([cell(value) for value in row] for row in rows)
    for texts in chain([columns, ["-" * width for width in widths]], cells, later):
        yield line([_cut(text, width) for text, width in zip(texts, widths, strict=True)] if room else texts)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
