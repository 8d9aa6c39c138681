"""The `lightopd` command: parse, call a stage, print its report, exit with a code."""

import logging
import os
import sys
from pathlib import Path

import typer

from lightopd import __version__
from lightopd.cli import cache, inspection, methods, settings, stages, tools
from lightopd.cli.guard import debug_file, guarded
from lightopd.cli.output import printable

app = typer.Typer(
    name="lightopd",
    help="Offline on-policy distillation: score a student's rollouts once, train without a live teacher.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"lightopd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
    debug: Path | None = typer.Option(
        None, "--debug", dir_okay=False, help="Keep the traceback of an error in this file."
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log more."),
) -> None:
    if debug is not None and not debug.absolute().parent.is_dir():
        raise typer.BadParameter(f"{debug.absolute().parent} is no folder", param_hint="--debug")
    debug_file.set(debug)
    logging.getLogger("lightopd").setLevel(logging.DEBUG if verbose else logging.INFO)


for group in (stages, cache, inspection, tools):
    for name, command in group.COMMANDS.items():
        app.command(name)(guarded(command))
app.add_typer(settings.app, name="config")
app.add_typer(methods.app, name="methods")


class _Printable(logging.Formatter):
    """Lines of the log without control characters that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """Time and message."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("lightopd")
    logger.handlers = [handler]
    logger.propagate = False


def main() -> None:
    """Entry point of the console script."""
    _log_to_stderr()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
