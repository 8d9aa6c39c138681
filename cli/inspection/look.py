"""What the commands that look at a cache share: their options, and how the cache is opened."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightopd.cli.output import say

if TYPE_CHECKING:
    from lightopd.inspection.opened import OpenedCache

CacheFolder = Annotated[Path, typer.Argument(help="Cache folder, or a URL such as s3://bucket/cache.")]
Runs = Annotated[
    list[Path] | None,
    typer.Option("--run", help="Folder of a run trained on the cache, for the table metrics; repeatable."),
]
Tokenizer = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder of the tokenizer, if the models that the cache names moved."),
]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Seconds after which a query is stopped.")]
Memory = Annotated[str | None, typer.Option("--memory", help="Most memory of a query, such as 4GB.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def open_for(
    cache: Path, runs: list[Path] | None, tokenizer: Path | None, timeout: float | None, memory: str | None
) -> "OpenedCache":
    """The cache and its runs, with the limits asked for."""
    from lightopd.inspection.opened import open_cache
    from lightopd.inspection.session import Limits

    return open_cache(cache, runs or (), tokenizer, Limits(timeout, memory))


def warn_without_tokenizer(opened: "OpenedCache", sql: str) -> None:
    """One line on stderr where a query asks for text and no tokenizer is there."""
    if ("decode(" in sql or "token(" in sql) and opened.texts.missing:
        say(f"{opened.texts.missing}: ids are shown as #17; give --tokenizer FOLDER", err=True)
