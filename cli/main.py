"""The `lightopd` command: parse, call a stage, print its report, exit with a code."""

import logging
import os
import sys

import typer

from lightopd import __version__
from lightopd.cli import cache, inspection, methods, settings, stages, tools
from lightopd.cli.guard import guarded

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
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log more."),
) -> None:
    logging.getLogger("lightopd").setLevel(logging.DEBUG if verbose else logging.INFO)


for group in (stages, cache, inspection, tools):
    for name, command in group.COMMANDS.items():
        app.command(name)(guarded(command))
app.add_typer(settings.app, name="config")
app.add_typer(methods.app, name="methods")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
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
