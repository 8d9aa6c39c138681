"""What a command does with a user's mistake, Ctrl-C and SIGTERM: one line and an exit code, no traceback."""

import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import ParamSpec

import click
import typer

from lightopd.errors import LightopdError, OutputError
from lightopd.ranks import is_worker
from lightopd.stopping import TERMINATED, sigterm_raises
from lightopd.telling import live_line_cleared

Arguments = ParamSpec("Arguments")

INTERRUPTED = 130
UNFORESEEN = 70
"""Exit code of an error that lightopd has no words for."""


def _unforeseen(error: Exception) -> str:
    """One line about an error, and where its traceback was written."""
    descriptor, name = tempfile.mkstemp(prefix="lightopd-debug-", suffix=".txt", text=True)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(" ".join(sys.argv) + "\n")
        traceback.print_exception(error, file=file)
    return f"{printable(type(error).__name__)}: {printable(str(error))[:300]}; report it with {name}"


def printable(text: str) -> str:
    """Text in one line, without control characters that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The command, with its errors told on stderr and turned into exit codes."""

    @functools.wraps(command)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        with sigterm_raises() as is_terminated:
            try:
                with live_line_cleared():
                    command(*args, **kwargs)
            except LightopdError as error:
                typer.echo(f"error: {printable(str(error))}", err=True)
                raise typer.Exit(error.exit_code) from error
            except OSError as error:
                named = f"{error.filename}: " if error.filename else ""
                typer.echo(f"error: {named}{error.strerror or error}", err=True)
                raise typer.Exit(OutputError.exit_code) from error
            except (typer.Exit, typer.Abort, click.ClickException):
                raise
            except Exception as error:  # what nobody foresaw: one line, and the rest in a file
                if is_worker():  # it hands its mistakes to the process that started it
                    raise
                typer.echo(f"error: {_unforeseen(error)}", err=True)
                raise typer.Exit(UNFORESEEN) from error
            except KeyboardInterrupt:
                by = " by SIGTERM" if is_terminated() else ""
                typer.echo(
                    f"stopped{by}; run the same command again to resume, finished work is kept", err=True
                )
                raise typer.Exit(TERMINATED if is_terminated() else INTERRUPTED) from None

    return call
