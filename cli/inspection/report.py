"""`lightopd report`: one HTML file about a cache and its runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lightopd.cli.inspection import look
from lightopd.cli.output import say


def report(
    cache: Annotated[Path, typer.Argument(help="Cache folder or URL, or the folder of a run.")],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs trained on it, to be shown side by side.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; without it report.html beside the cache.")
    ] = None,
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Most rollouts in the viewer.")] = 1_000,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Most response tokens in the viewer; the file's size.")
    ] = 400_000,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Entries of each signal at a position.")] = 8,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run `lightopd verify` first.")] = True,
    tokenizer: look.Tokenizer = None,
    as_json: look.AsJson = False,
) -> None:
    """Write one HTML file: lineage, checks, distributions, training, and each token teacher against student.

    Example: lightopd report runs/cache runs/train --out report.html
    """
    from lightopd.inspection.runs import find_cache

    folder, own = find_cache(cache)
    opened = look.open_for(folder, [*own, *(runs or [])], tokenizer, None, None)
    if opened.texts.missing:
        say(f"{opened.texts.missing}: ids are shown as #17; give --tokenizer FOLDER", err=True)
    path = opened.report(out, rollouts=rollouts, tokens=tokens, top_k=top_k, check=check)
    size_bytes = path.stat().st_size
    if as_json:
        say(json.dumps({"report": str(path), "size_bytes": size_bytes}))
    else:
        say(f"{path} ({size_bytes / 1e6:.1f} MB): open it in a browser")
