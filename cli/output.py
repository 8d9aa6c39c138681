"""What a person sees: reports as aligned lines, tables, and JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lightopd.pipelines.shared.reports import Report


def show_report(report: "Report", as_json: bool = False) -> None:
    """The report on stdout: one JSON line, or aligned lines for people."""
    from lightopd.ranks import is_main

    if not is_main():
        return
    if as_json:
        typer.echo(report.as_json())
        return
    typer.echo(f"{report.stage}: {report.out}")
    width = max((len(key) for key in report.figures), default=0)
    for key, value in report.figures.items():
        typer.echo(f"  {key:<{width}}  {number(value)}")
    if report.rows:
        typer.echo("")
        show_table(list(report.rows[0]), report.rows)
    for reason, count in report.dropped.items():
        typer.echo(f"  dropped {count}: {reason}")
    for note in report.notes:
        typer.echo(f"  ! {note}")


def number(value: Any) -> str:
    """A figure for people: four significant digits, thousands apart, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def show_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as aligned columns; numbers to the right."""
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[i]) for line in cells), 0) if cells else len(column)
        for i, column in enumerate(columns)
    ]
    is_number = [bool(rows) and all(isinstance(r[c], int | float | None) for r in rows) for c in columns]
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ]
        typer.echo("  ".join(parts).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = (
        value
        if isinstance(value, str)
        else json.dumps(value, default=str)
        if isinstance(value, list | dict)
        else str(value)
    )
    text = text.replace("\n", "\\n")
    return "-" if value is None else text if len(text) <= 60 else text[:57] + "..."
