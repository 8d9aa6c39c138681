"""`lightopd methods`: the recipes, what they need, and whether a cache can serve them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lightopd.cli import options
from lightopd.cli.guard import guarded
from lightopd.cli.output import number, say, show_table

app = typer.Typer(
    no_args_is_help=True,
    help="List, show and check method recipes, and diagnose signals.",
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="Name of a method, as in the list.")]


@app.command("list")
@guarded
def list_(as_json: options.Json = False) -> None:
    """The method recipes, with their papers and what each needs from a cache.

    Example: lightopd methods list
    """
    from lightopd.pipelines import RECIPES
    from lightopd.pipelines.methods import list_methods, needs_lines

    rows = [
        {"method": method.name, "paper": method.paper, "needs": "; ".join(needs_lines(method.needs))}
        for method in list_methods(RECIPES / "methods")
    ]
    if as_json:
        say(json.dumps(rows))
    else:
        show_table(["method", "paper", "needs"], rows)


@app.command()
@guarded
def show(name: Name, as_json: options.Json = False) -> None:
    """One method: what it does, what it needs, and its recipe.

    Example: lightopd methods show lightning_opd
    """
    from lightopd.pipelines import RECIPES
    from lightopd.pipelines.methods import find_method, needs_lines

    method = find_method(RECIPES / "methods", name)
    if as_json:
        facts: dict[str, Any] = {"method": method.name, "title": method.title, "paper": method.paper}
        facts |= {"sentence": method.sentence, "needs": list(needs_lines(method.needs))}
        say(json.dumps({**facts, "recipe": method.path.read_text(encoding="utf-8")}))
        return
    say(f"{method.title} ({method.paper})\n{method.sentence}\n\nneeds:")
    for line in needs_lines(method.needs):
        say(f"  {line}")
    recipe = method.path.read_text(encoding="utf-8").split("\n", 3)[-1].strip("\n")
    say(f"\nlightopd train -c methods/{method.name} --cache CACHE --student STUDENT --out RUN\n\n{recipe}")


@app.command()
@guarded
def check(
    name: Name,
    cache: Annotated[Path, typer.Argument(help="Cache folder.")],
    as_json: options.Json = False,
) -> None:
    """Whether a cache can serve a method; what is missing, with the command that adds it.

    Example: lightopd methods check vopd runs/cache
    """
    from lightopd.cache.store import open_cache
    from lightopd.objectives.preparation.serving import cache_facts
    from lightopd.pipelines import RECIPES
    from lightopd.pipelines.methods import check_method, find_method
    from lightopd.pipelines.shared.gap import suggestion

    method = find_method(RECIPES / "methods", name)
    opened = open_cache(cache)
    lacks, warnings = check_method(method, cache_facts(opened, method.needs))
    if as_json:
        say(json.dumps({"can_serve": not lacks, "lacks": list(lacks), "warnings": list(warnings)}))
        if lacks:
            raise typer.Exit(5)
        return
    for line in warnings:
        say(f"! {line}")
    for line in lacks:
        say(line)
    if lacks:
        raise typer.Exit(5)
    say(f"{cache} can serve {name}")
    wanted = {key: method.settings[key] for key in ("steps", "batch_sequences")}
    rate = method.settings["optimizer"]["lr"]
    if suggested := suggestion(opened, method.objective, **wanted, learning_rate=rate):
        say(f"! {suggested}")


@app.command()
@guarded
def diagnose(
    cache: Annotated[Path, typer.Argument(help="Cache folder.")],
    branches: Annotated[
        str, typer.Option("--branches", help="Text column of graded branches, of `lightopd rewrite`.")
    ] = "branches",
    as_json: options.Json = False,
) -> None:
    """Whether what a signal teaches makes responses right: cosine of its gradient with the ideal one.

    Example: lightopd methods diagnose runs/cache
    """
    from lightopd.cache.store import open_cache
    from lightopd.pipelines.caches.alignment import measure_alignment

    found = measure_alignment(open_cache(cache), branches)
    if as_json:
        say(json.dumps(asdict(found)))
        return
    rows = [{name: number(value) for name, value in row.items()} for row in found.rows]
    show_table(["signal", "divergence", "rollouts", "cuts", "cosine", "error"], rows)
    say(f"{found.cuts} cuts, {found.flat} of them without a cosine: every token led to the same score")
    for signal, count in found.left_out.items():
        if count:
            say(f"! {count} tokens lie outside the top-k of {signal}: left out; score it with support=both")
