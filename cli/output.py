"""What a person sees: reports as aligned lines, tables, and JSON for programs."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from lightopd.telling import printable
from lightopd.text_tables import table_lines

if TYPE_CHECKING:
    from lightopd.pipelines.shared.reports import Report


def say(text: str, err: bool = False) -> None:
    """Lines for people, on stdout or stderr; what came from files and servers cannot steer the terminal."""
    typer.echo("\n".join(map(printable, text.split("\n"))), err=err)


def show_report(report: "Report", as_json: bool = False) -> None:
    """The report on stdout: one JSON line, or aligned lines for people."""
    from lightopd.ranks import is_main

    if not is_main():
        return
    if as_json:
        typer.echo(report.as_json())
        return
    say(f"{report.stage}: {report.out}")
    width = max((len(key) for key in report.figures), default=0)
    for key, value in report.figures.items():
        say(f"  {key:<{width}}  {number(value)}")
    if report.rows:
        say("")
        show_table(list(report.rows[0]), report.rows)
    for reason, count in report.dropped.items():
        say(f"  dropped {count}: {reason}")
    for note in report.notes:
        say(f"  ! {note}")


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
    """Rows as aligned columns, numbers to the right; on a terminal the widest shrinks until all fit."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in table_lines(columns, ([row[column] for column in columns] for row in rows), room):
        say(line)
