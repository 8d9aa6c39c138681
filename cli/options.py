"""Options that several commands share, each defined once."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Configs = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="YAML file or recipe name; later ones are laid over earlier ones."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, such as --set optimizer.lr=1e-5; repeatable.")
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow", help="Override a refusal, such as teacher-mismatch; recorded in everything made."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON line on stdout.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Folder or hub id of the teacher.")]
Student = Annotated[str | None, typer.Option("--student", help="Folder or hub id of the student.")]
Prompts = Annotated[
    str | None, typer.Option("--prompts", help="File, `datasets` folder or hub id of prompts.")
]
Cache = Annotated[str | None, typer.Option("--cache", help="Cache folder.")]
Rollouts = Annotated[str | None, typer.Option("--rollouts", help="Cache to take the rollouts from.")]
Out = Annotated[str | None, typer.Option("--out", help="Folder of the run.")]
Engine = Annotated[str | None, typer.Option("--engine", help="Engine kind: hf, vllm or server.")]
Server = Annotated[
    list[str] | None, typer.Option("--server", help="Address of a running vLLM server; repeatable.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Teacher tokens kept at each position.")]
Horizon = Annotated[
    str | None,
    typer.Option("--horizon", help="Score each response's first tokens alone: 512, or a share (0.3)."),
]
CrossCheck = Annotated[
    int | None,
    typer.Option("--cross-check", help="Compare so many rollouts with transformers in float32."),
]
Keep = Annotated[
    str | None, typer.Option("--keep", help="topk, or hidden: what gives the whole vocabulary again.")
]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", help="Columns of other names: --map prompt=question,answer=solution."),
]
SftTeacher = Annotated[
    str | None,
    typer.Option(
        "--sft-teacher", help="SFT teacher of a student made elsewhere: declared, not proven; or none."
    ),
]
Exclusive = Annotated[
    bool | None,
    typer.Option("--exclusive", help="Refuse a cache that another process writes, instead of joining it."),
]
Replicas = Annotated[
    int | None, typer.Option("--replicas", help="Processes to start, each with an engine of its own.")
]
Execution = Annotated[
    str | None,
    typer.Option("--execution", help="Where the replicas run: local, or ray (the cluster at RAY_ADDRESS)."),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Sampling temperature; 0 takes the most likely token.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Longest response in tokens.")]
Lr = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Sequences of one optimiser step.")]


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, at any depth; a group without any is left out."""
    found = {name: given(value) if isinstance(value, Mapping) else value for name, value in flags.items()}
    return {name: value for name, value in found.items() if value is not None and value != {}}


def columns_of(maps: list[str] | None) -> dict[str, str] | None:
    """`--map a=b,c=d` as a mapping.

    Raises:
        ConfigError: a pair without `=`.
    """
    from lightopd.errors import ConfigError

    columns = {}
    for pair in (pair for text in maps or () for pair in text.split(",") if pair.strip()):
        name, separator, column = pair.partition("=")
        if not separator or not name.strip() or not column.strip():
            raise ConfigError(f"--map {pair!r} is not field=column, such as --map prompt=question")
        columns[name.strip()] = column.strip()
    return columns or None


def prompts_of(path: str | None, maps: list[str] | None) -> str | dict[str, Any] | None:
    """`--prompts` and `--map` as the setting `prompts`."""
    columns = columns_of(maps)
    return path if columns is None else given({"path": path, "columns": columns})
