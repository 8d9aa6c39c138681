"""What a command does with a user's mistake and with Ctrl-C: one line and an exit code, never a traceback."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from lightopd.errors import LightopdError, OutputError

Arguments = ParamSpec("Arguments")

INTERRUPTED = 130


def guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The command, with its errors told on stderr and turned into exit codes."""

    @functools.wraps(command)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
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
            typer.echo("stopped; run the same command again to go on, finished work is kept", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return call
