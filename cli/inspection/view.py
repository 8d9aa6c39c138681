"""`lightopd view`: the report of a large cache, served on this machine a page at a time."""

from pathlib import Path
from typing import Annotated

import typer

from lightopd.cli.inspection import look
from lightopd.cli.output import say


def view(
    cache: Annotated[Path, typer.Argument(help="Cache folder or URL, or the folder of a run.")],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs trained on it, to be shown side by side.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host", help="Address to listen on; another than this machine's own is open to others."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Rollouts on a page.")] = 200,
    every: Annotated[
        float, typer.Option("--every", min=0.2, help="Seconds between two looks at a run that trains.")
    ] = 10.0,
    tokenizer: look.Tokenizer = None,
    memory: look.Memory = None,
) -> None:
    """Serve the report on this machine, a page of rollouts at a time, live while a run trains.

    Example: lightopd view runs/cache runs/train --port 8765
    """
    import asyncio

    from lightopd.inspection.live.pages import Pages
    from lightopd.inspection.live.server import serve
    from lightopd.inspection.report.charts import altair
    from lightopd.inspection.runs import find_cache

    altair()
    folder, own = find_cache(cache)
    opened = look.open_for(folder, [*own, *(runs or [])], tokenizer, None, memory)
    look.warn_without_tokenizer(opened, "decode(")

    def told(address: str) -> None:
        say(address)
        say("Ctrl-C ends it", err=True)

    try:
        asyncio.run(serve(Pages(opened, rollouts, every), host, port, told))
    except KeyboardInterrupt:
        say("stopped", err=True)
