"""`lightopd doctor`: what this machine has and lacks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lightopd.cli.inspection import look
from lightopd.cli.output import say


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder whose disk is measured.")] = Path(),
    as_json: look.AsJson = False,
) -> None:
    """Versions, devices, free memory and disk, and which engines and extras work here; exit code 1 when ill.

    Example: lightopd doctor runs --json
    """
    from lightopd.inspection.doctor import examine

    facts = examine(folder)
    is_well = all(fact.is_well is not False for fact in facts)
    if as_json:
        say(json.dumps({"is_well": is_well, "facts": [asdict(fact) for fact in facts]}))
    else:
        width = max(len(fact.name) for fact in facts)
        group = ""
        for fact in facts:
            if fact.group != group:
                group = fact.group
                say(group)
            mark = {True: "+", False: "!", None: " "}[fact.is_well]
            say(f"  {mark} {fact.name:<{width}}  {fact.value}")
    if not is_well:
        raise typer.Exit(1)
