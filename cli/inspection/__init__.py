"""Commands that look at a cache and its runs."""

from collections.abc import Callable

import typer

from lightopd.cli.guard import guarded
from lightopd.cli.inspection.doctor import doctor
from lightopd.cli.inspection.report import report
from lightopd.cli.inspection.sql import sql
from lightopd.cli.inspection.view import view


def register(app: typer.Typer) -> None:
    """Add the commands of this package to the app."""
    commands: dict[str, Callable[..., None]] = {"sql": sql, "report": report, "view": view, "doctor": doctor}
    for name, command in commands.items():
        app.command(name)(guarded(command))
