"""`lightopd cache`: list caches, make one of several or several of one, drop a signal, clear leftovers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lightopd.cli import options
from lightopd.cli.guard import guarded
from lightopd.cli.output import say, show_report, show_table

app = typer.Typer(
    no_args_is_help=True,
    help="Look after caches. Example: lightopd cache ls runs",
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(help="Cache folder.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without, only say what would be deleted.")]
NewFolder = Annotated[Path, typer.Option("--out", help="Folder that is created.")]


@app.command()
@guarded
def ls(
    paths: Annotated[list[Path], typer.Argument(help="Caches, or folders that have some.")],
    as_json: options.Json = False,
) -> None:
    """The parts of each cache: rollouts and signals, tokens, shards that are there, bytes, state.

    Example: lightopd cache ls runs
    """
    from lightopd.pipelines.maintenance.listing import COLUMNS, list_caches

    rows = list_caches(paths)
    if as_json:
        say(json.dumps(rows))
    else:
        show_table(COLUMNS, rows)


@app.command()
@guarded
def merge(
    caches: Annotated[list[Path], typer.Argument(help="Caches of one student and one sampling contract.")],
    out: NewFolder,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", help="Signal or text to leave out; repeatable.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make one cache of several, with the signals that all of them have; nothing is scored again.

    Example: lightopd cache merge runs/monday runs/tuesday --out runs/both
    """
    from lightopd.pipelines.maintenance.merge import merge as make

    show_report(make(out, caches, drop=drop or ()), as_json)


@app.command()
@guarded
def split(
    cache: Folder,
    out: NewFolder,
    parts: Annotated[int | None, typer.Option("--parts", min=2, help="So many equal parts.")] = None,
    fraction: Annotated[
        str | None, typer.Option("--fraction", help="Share of the prompts for each part: 0.9,0.1.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the prompts of each part.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Make several caches of one, OUT/part-1 and so on; rollouts of one prompt stay together.

    Example: lightopd cache split runs/cache --fraction 0.9,0.1 --out runs/parts
    """
    from lightopd.errors import ConfigError
    from lightopd.pipelines.maintenance.split import equal_parts
    from lightopd.pipelines.maintenance.split import split as make

    if (parts is None) == (fraction is None):
        raise ConfigError("split needs --parts 4 or --fraction 0.9,0.1, one of the two")
    try:
        shares = equal_parts(parts) if parts else [float(each) for each in (fraction or "").split(",")]
    except ValueError:
        raise ConfigError(f"--fraction {fraction} is not a list of numbers, such as 0.9,0.1") from None
    show_report(make(out, cache, shares, seed=seed), as_json)


@app.command("drop-signal")
@guarded
def drop_signal(
    cache: Folder,
    name: Annotated[str, typer.Argument(help="Signal that is deleted.")],
    yes: Yes = False,
    as_json: options.Json = False,
) -> None:
    """Delete a signal's scores, manifest and all; the index follows.

    Example: lightopd cache drop-signal runs/cache reference --yes
    """
    from lightopd.pipelines.maintenance.clearing import drop_signal as drop

    freed = drop(cache, name, is_sure=yes)
    told = {"cache": str(cache), "signal": name, "freed_bytes": freed}
    say(json.dumps(told) if as_json else f"signal {name} is gone, {freed:,} bytes are freed")


@app.command()
@guarded
def gc(cache: Folder, yes: Yes = False, as_json: options.Json = False) -> None:
    """List what killed stages left in a cache, and delete it with --yes.

    Example: lightopd cache gc runs/cache --yes
    """
    from lightopd.pipelines.maintenance.clearing import collect, leftovers

    found = collect(cache) if yes else leftovers(cache)
    rows = [{"path": str(each.path), "bytes": each.size_bytes, "why": each.why} for each in found]
    total = sum(each.size_bytes for each in found)
    if as_json:
        say(json.dumps({"cache": str(cache), "is_deleted": yes, "bytes": total, "leftovers": rows}))
        return
    if rows:
        show_table(["path", "bytes", "why"], rows)
    done = "are deleted" if yes else "would be deleted with --yes"
    say(f"{len(rows)} leftovers, {total:,} bytes, {done}" if rows else f"{cache} has no leftovers")
