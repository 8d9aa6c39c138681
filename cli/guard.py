"""What a command does with a user's mistake, Ctrl-C and SIGTERM: one line and an exit code, no traceback."""

import functools
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec

import typer

from lightopd.errors import LightopdError, OutputError
from lightopd.ranks import is_worker
from lightopd.stopping import TERMINATED, sigterm_raises
from lightopd.telling import live_line_cleared, printable

Arguments = ParamSpec("Arguments")

INTERRUPTED = 130
UNFORESEEN = 70
"""Exit code of an error that lightopd has no words for."""

debug_file: ContextVar[Path | None] = ContextVar("debug_file", default=None)
"""Where `--debug` keeps the traceback of an error."""


def _unforeseen(error: Exception) -> str:
    """One line about an error, and where its traceback was written: the stage may have run for hours."""
    name = _keep_traceback(error) or tempfile.mkstemp(prefix="lightopd-debug-", suffix=".txt")[1]
    _write_traceback(error, name)
    return f"{type(error).__name__}: {str(error)[:300]}; report it with {name}"


def _keep_traceback(error: Exception) -> str | None:
    """Writes the error's traceback to the file of `--debug`, which it returns; None where none was named."""
    file = debug_file.get()
    if file is not None:
        _write_traceback(error, str(file))
    return None if file is None else str(file)


def _write_traceback(error: Exception, name: str) -> None:
    with Path(name).open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(" ".join(sys.argv) + "\n")
        traceback.print_exception(error, file=file)


def _say(line: str) -> None:
    typer.echo(printable(line), err=True)


def guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The command, with its errors told on stderr and turned into exit codes."""

    @functools.wraps(command)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        with sigterm_raises() as is_terminated:
            try:
                with live_line_cleared():
                    command(*args, **kwargs)
            except LightopdError as error:
                _keep_traceback(error)
                _say(f"error: {error}")
                raise typer.Exit(error.exit_code) from error
            except OSError as error:
                _keep_traceback(error)
                named = f"{error.filename}: " if error.filename else ""
                _say(f"error: {named}{error.strerror or error}")
                raise typer.Exit(OutputError.exit_code) from error
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except Exception as error:  # what nobody foresaw: one line, and the rest in a file
                if is_worker():  # it hands its mistakes to the process that started it
                    raise
                _say(f"error: {_unforeseen(error)}")
                raise typer.Exit(UNFORESEEN) from error
            except KeyboardInterrupt:
                by = " by SIGTERM" if is_terminated() else ""
                typer.echo(
                    f"stopped{by}; run the same command again to resume, finished work is kept", err=True
                )
                raise typer.Exit(TERMINATED if is_terminated() else INTERRUPTED) from None

    return call
