"""What a command does with a user's mistake, Ctrl-C and SIGTERM: one line and an exit code, no traceback."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from lightopd.errors import LightopdError, OutputError
from lightopd.stopping import TERMINATED, sigterm_raises

Arguments = ParamSpec("Arguments")

INTERRUPTED = 130


def guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The command, with its errors told on stderr and turned into exit codes."""

    @functools.wraps(command)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        with sigterm_raises() as is_terminated:
            try:
                command(*args, **kwargs)
            except LightopdError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(error.exit_code) from error
            except OSError as error:
                named = f"{error.filename}: " if error.filename else ""
                typer.echo(f"error: {named}{error.strerror or error}", err=True)
                raise typer.Exit(OutputError.exit_code) from error
            except KeyboardInterrupt:
                by = " by SIGTERM" if is_terminated() else ""
                typer.echo(
                    f"stopped{by}; run the same command again to resume, finished work is kept", err=True
                )
                raise typer.Exit(TERMINATED if is_terminated() else INTERRUPTED) from None

    return call
