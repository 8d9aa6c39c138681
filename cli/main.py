"""The `lightopd` command: parse, call a stage, print its report, exit with a code."""

import logging
import os
import sys
from pathlib import Path

import typer

from lightopd import __version__
from lightopd.cli import cache, inspection, methods, settings, stages, tools
from lightopd.cli.guard import debug_file, guarded
from lightopd.cli.maintenance import app as maintenance
from lightopd.telling import LogLines

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
    for handler in logging.getLogger("lightopd").handlers:
        if isinstance(handler, LogLines):
            handler.shows_debug = verbose


for group in (stages, cache, inspection, tools):
    for name, command in group.COMMANDS.items():
        app.command(name)(guarded(command))
app.add_typer(settings.app, name="config")
app.add_typer(methods.app, name="methods")
app.add_typer(maintenance.app, name="cache")


def _log_to_stderr() -> None:
    logger = logging.getLogger("lightopd")
    logger.setLevel(logging.DEBUG)
    logger.handlers = [LogLines(sys.stderr)]
    logger.propagate = False
    # Where torchao is installed, transformers imports it, and it warns of kernels that nobody asked for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point of the console script."""
    _log_to_stderr()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
