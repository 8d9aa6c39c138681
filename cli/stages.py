"""The stages as commands: sft, rollout, precompute, train, eval, run."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lightopd.cli import options
from lightopd.cli.heartbeat import never_silent
from lightopd.cli.output import show_report


def sft(
    config: options.Configs = None,
    sets: options.Sets = None,
    teacher: options.Teacher = None,
    student: options.Student = None,
    prompts: options.Prompts = None,
    out: options.Out = None,
    engine: options.Engine = None,
    server: options.Server = None,
    part: Annotated[str | None, typer.Option("--part", help="both, answers or finetune.")] = None,
    columns: options.Map = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    lr: options.Lr = None,
    steps: options.Steps = None,
    batch: options.Batch = None,
    allow: options.Allow = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """A teacher answers prompts; a student is fine-tuned on the answers.

    Example: lightopd sft --teacher T --student BASE --prompts prompts.jsonl --out runs/sft
    """
    flags: dict[str, Any] = {"teacher": teacher, "student": student, "out": out, "part": part}
    flags["prompts"] = options.prompts_of(prompts, columns)
    flags["sampling"] = {"temperature": temperature, "max_tokens": max_tokens}
    flags["finetune"] = {"optimizer": {"lr": lr}, "steps": steps, "batch_sequences": batch}
    _run_stage("sft", config, sets, {**flags, **_common(engine, server, allow)}, as_json, dry_run=dry_run)


def rollout(
    config: options.Configs = None,
    sets: options.Sets = None,
    student: options.Student = None,
    prompts: options.Prompts = None,
    cache: options.Cache = None,
    columns: options.Map = None,
    sft_teacher: options.SftTeacher = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    n: Annotated[int | None, typer.Option("--n", help="Rollouts per prompt.")] = None,
    engine: options.Engine = None,
    server: options.Server = None,
    replicas: options.Replicas = None,
    execution: options.Execution = None,
    exclusive: options.Exclusive = None,
    allow: options.Allow = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """The student answers prompts once; ids, log-probabilities and rewards go into a cache.

    Example: lightopd rollout --student runs/sft/student --prompts prompts.jsonl --cache runs/cache
    """
    flags: dict[str, Any] = {"student": student, "cache": cache, "sft_teacher": sft_teacher}
    flags["sharing"] = _sharing(replicas, execution, exclusive)
    flags["prompts"] = options.prompts_of(prompts, columns)
    flags["sampling"] = {"n": n, "temperature": temperature, "max_tokens": max_tokens}
    _run_stage(
        "rollout",
        config,
        sets,
        {**flags, **_common(engine, server, allow)},
        as_json,
        dry_run=dry_run,
    )


def rewrite(
    config: options.Configs = None,
    sets: options.Sets = None,
    cache: options.Cache = None,
    model: Annotated[str | None, typer.Option("--model", help="Folder or hub id of the model.")] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="A shipped one, such as refine, or Jinja text.")
    ] = None,
    prompts: options.Prompts = None,
    columns: options.Map = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the text column.")] = None,
    gives: Annotated[
        str | None, typer.Option("--gives", help="text, context, rollouts, prompts, branches.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder of --gives rollouts or prompts.")] = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    sft_teacher: options.SftTeacher = None,
    engine: options.Engine = None,
    server: options.Server = None,
    allow: options.Allow = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """A model is shown each rollout and writes a text: a column, a context, or new rollouts.

    Example: lightopd rewrite --cache runs/cache --model T --template refine --prompts prompts.jsonl
    """
    flags: dict[str, Any] = {"cache": cache, "model": model, "template": template, "name": name}
    flags |= {"gives": gives, "out": out, "sft_teacher": sft_teacher}
    flags["prompts"] = options.prompts_of(prompts, columns)
    flags["sampling"] = {"temperature": temperature, "max_tokens": max_tokens}
    _run_stage("rewrite", config, sets, {**flags, **_common(engine, server, allow)}, as_json, dry_run=dry_run)


def precompute(
    config: options.Configs = None,
    sets: options.Sets = None,
    cache: options.Cache = None,
    rollouts: options.Rollouts = None,
    teacher: options.Teacher = None,
    signal: Annotated[
        str | None, typer.Option("--signal", help="Name of the signal; several fit in one cache.")
    ] = None,
    top_k: options.TopK = None,
    horizon: options.Horizon = None,
    keep: options.Keep = None,
    sft_teacher: options.SftTeacher = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", help="Show the model another prompt: a template's name or Jinja text; see --prompts."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="With --context: the rollouts' prompts and the template's columns."),
    ] = None,
    columns: options.Map = None,
    cross_check: options.CrossCheck = None,
    engine: options.Engine = None,
    server: options.Server = None,
    replicas: options.Replicas = None,
    execution: options.Execution = None,
    exclusive: options.Exclusive = None,
    allow: options.Allow = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="With --dry-run: tokens per second, instead of measuring.")
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """A teacher scores every token of the cached rollouts; refused unless it taught the student.

    Example: lightopd precompute --cache runs/cache --teacher T --top-k 32
    """
    flags: dict[str, Any] = {
        "cache": cache,
        "rollouts": rollouts,
        "teacher": teacher,
        "signal": signal,
        "top_k": top_k,
    }
    flags |= {"keep": keep, "horizon": horizon, "cross_check": cross_check, "sft_teacher": sft_teacher}
    flags |= {"sharing": _sharing(replicas, execution, exclusive), **_common(engine, server, allow)}
    shown = {"template": context, "prompts": options.prompts_of(prompts, columns)}
    if any(shown.values()):
        flags["context"] = {name: value for name, value in shown.items() if value is not None}
    _run_stage("precompute", config, sets, flags, as_json, dry_run=dry_run, tokens_per_s=rate)


def train(
    config: options.Configs = None,
    sets: options.Sets = None,
    cache: options.Cache = None,
    student: options.Student = None,
    out: options.Out = None,
    lr: options.Lr = None,
    steps: options.Steps = None,
    batch: options.Batch = None,
    devices: Annotated[int | None, typer.Option("--devices", help="Devices on each node.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", help="Nodes.")] = None,
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="How devices share the work: auto, ddp or fsdp.")
    ] = None,
    allow: options.Allow = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """The student is trained against the cache, with no teacher alive.

    Example: lightopd train --cache runs/cache --student runs/sft/student --out runs/train
    """
    flags = {
        "cache": cache,
        "student": student,
        "out": out,
        "optimizer": {"lr": lr},
        "steps": steps,
        "batch_sequences": batch,
        "devices": devices,
        "nodes": nodes,
        "strategy": strategy,
    }
    _run_stage("train", config, sets, {**flags, "allow": allow or None}, as_json, dry_run=dry_run)


def evaluate(
    config: options.Configs = None,
    sets: options.Sets = None,
    model: Annotated[str | None, typer.Option("--model", help="Folder or hub id of the model.")] = None,
    prompts: options.Prompts = None,
    columns: options.Map = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    out: options.Out = None,
    teacher: options.Teacher = None,
    engine: options.Engine = None,
    server: options.Server = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """A model answers held-out prompts: accuracy, and KL to a teacher.

    Example: lightopd eval --model runs/train/student --prompts heldout.jsonl --out runs/eval
    """
    flags: dict[str, Any] = {"model": model, "out": out, "teacher": teacher}
    flags["prompts"] = options.prompts_of(prompts, columns)
    flags["sampling"] = {"temperature": temperature, "max_tokens": max_tokens}
    _run_stage("eval", config, sets, {**flags, **_common(engine, server, None)}, as_json, dry_run=dry_run)


def run(
    config: options.Configs = None,
    sets: options.Sets = None,
    out: options.Out = None,
    teacher: options.Teacher = None,
    student: options.Student = None,
    prompts: options.Prompts = None,
    columns: options.Map = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", help="Train on one cache for each value: --sweep train.optimizer.lr=1e-5,3e-5."
        ),
    ] = None,
    allow: options.Allow = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
) -> None:
    """The whole pipeline from one YAML file; what is done and valid is skipped.

    Example: lightopd run -c run.yaml --sweep train.optimizer.lr=1e-5,3e-5
    """
    from lightopd.config import load_run
    from lightopd.pipelines import RECIPES
    from lightopd.pipelines import run as pipeline

    flags: dict[str, Any] = {"out": out, "teacher": teacher, "student": student, "allow": allow or None}
    flags["prompts"] = options.prompts_of(prompts, columns)
    loaded = load_run(config or [], sets or [], options.given(flags), RECIPES)

    def told(each: Any) -> None:
        if not as_json:
            show_report(each)

    with never_silent("run"):
        if sweep is None:
            report = pipeline.run(loaded, dry_run=dry_run, told=told)
        else:
            report = pipeline.sweep(loaded, sweep, dry_run=dry_run, told=told)
    show_report(report, as_json)


def _sharing(replicas: int | None, execution: str | None, exclusive: bool | None) -> dict[str, Any]:
    return {"replicas": replicas, "execution": execution, "exclusive": exclusive}


def _common(engine: str | None, server: list[str] | None, allow: list[str] | None) -> dict[str, Any]:
    chosen = {"kind": "server", "urls": server} if server else {"kind": engine} if engine else None
    return {"engine": chosen, "allow": allow or None}


def _run_stage(
    stage: str,
    files: list[str] | None,
    sets: list[str] | None,
    flags: Mapping[str, Any],
    as_json: bool,
    **arguments: Any,
) -> None:
    from lightopd.config import load_stage
    from lightopd.pipelines import RECIPES
    from lightopd.pipelines.run import RUNNERS

    # The kind comes before the settings of that kind, which would be lost when it changed after them.
    chosen = flags.get("engine") or {}
    kind = [f"engine.kind={chosen['kind']}"] if chosen else []
    loaded = load_stage(stage, files or [], [*kind, *(sets or [])], options.given(flags), RECIPES)
    with never_silent(stage):
        report = RUNNERS[stage](loaded, **arguments)
    show_report(report, as_json)


COMMANDS = {
    "sft": sft,
    "rollout": rollout,
    "rewrite": rewrite,
    "precompute": precompute,
    "train": train,
    "eval": evaluate,
    "run": run,
}
