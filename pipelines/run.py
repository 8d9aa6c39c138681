"""The whole pipeline from one run file: sft, rollout, precompute, train, and evaluations around it.

    lightopd run -c run.yaml

What is finished and made under the same settings is not made again; a stage that was stopped resumes. With
`rounds` or `phases` rollout, precompute and train are repeated. A sweep trains on one cache once for each
value of one setting of `train`:

    lightopd run -c run.yaml --sweep train.optimizer.lr=1e-5,3e-5
"""

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightopd.config import build, laid_over
from lightopd.errors import ConfigError
from lightopd.pipelines import evaluate, precompute, rewrite, rollout, rounds, sft, train
from lightopd.pipelines.run_checks import check_pipeline
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.schemas.run import STAGES, RunConfig

RUNNERS: dict[str, Callable[..., Report]] = {
    "sft": sft.run,
    "rollout": rollout.run,
    "rewrite": rewrite.run,
    "precompute": precompute.run,
    "train": train.run,
    "eval": evaluate.run,
}
"""What runs each stage; one entry for each of `lightopd.schemas.run.STAGES`."""

NEEDS = {"rollout": "sft", "precompute": "rollout", "train": "precompute", "eval_before": "sft"}
NEEDS |= {"eval_after": "train"}
"""The step whose output a step reads."""


def run(
    config: RunConfig,
    *,
    dry_run: bool = False,
    told: Callable[[Report], None] = lambda _: None,
    before_training: Callable[[], None] = lambda: None,
) -> Report:
    """Run every stage of the pipeline in order; `told` hears each stage's report.

    Everything that a later stage would refuse is refused before the first. With `dry_run` each stage says
    what it would do, as far as what it reads is there.
    """
    started_s = time.monotonic()
    check_pipeline(config, lambda name: _has_finished(config, name))
    if dry_run:
        return _plan(config, told)
    with writing(config.out):
        save_config(config, "run", config.out, only_first=True)
        reports = {}
        for name, stage, settings in config.pipeline():
            if config.is_multi_round and stage in ("precompute", "train"):
                continue  # rounds and phases take them together with rollout
            if config.is_multi_round and stage == "rollout":
                repeated = rounds.run(config, told=told)
                reports[repeated.stage] = repeated
                told(repeated)
                continue
            if stage == "train":
                before_training()
            reports[name] = RUNNERS[stage](build(STAGES[stage], settings))
            told(reports[name])
        report = Report("run", str(config.out), _summary(reports), seconds=time.monotonic() - started_s)
        save_config(config, "run", config.out)
        save_report(report, config.out)
    return report


def variants(config: RunConfig, assignment: str) -> dict[str, RunConfig]:
    """The run for each value of `train.optimizer.lr=1e-5,3e-5`, each training in a folder of its own.

    Raises:
        ConfigError: it is no setting of `train` with two values or more, one is given twice or does not fit,
            or the run has rounds.
    """
    key, _, text = assignment.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key.startswith("train.") or len(values) < 2 or "" in values:
        raise ConfigError(
            f"--sweep {assignment!r} is no setting of train with several values, such as "
            "--sweep train.optimizer.lr=1e-5,3e-5"
        )
    if config.is_multi_round:
        raise ConfigError(
            "a sweep trains on one cache, rounds and phases make new ones; leave one of them out"
        )
    made = {}
    for value in values:
        name = re.sub(r"[^\w.+-]+", "_", f"{key.rpartition('.')[2]}-{value}")
        train = laid_over({"train": config.train}, [f"{key}={value}"], {})["train"]
        train = {**train, "out": config.out / "sweep" / name / "train"}
        made[value] = config.model_copy(update={"train": train})
        build(STAGES["train"], made[value].settings("train"))
    if len({str(each.train) for each in made.values()}) < len(values):
        raise ConfigError(f"--sweep {assignment!r} gives a value twice; name each once")
    return made


def sweep(
    config: RunConfig,
    assignment: str,
    *,
    dry_run: bool = False,
    told: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Make the cache once, train on it for each value, and say in a table what came out."""
    started_s = time.monotonic()
    runs = variants(config, assignment)
    for each in runs.values():
        check_pipeline(each, partial(_has_finished, each), trainings=len(runs))
    if dry_run:
        for each in runs.values():
            report = _plan(each, told)
        return report
    rows = []
    with writing(config.out):
        save_config(config, "run", config.out, only_first=True)
        told_already = set[str]()
        for value, each in runs.items():
            reports = {}
            for name, stage, settings in each.pipeline():
                if name in told_already:
                    continue  # what comes before training is the same for all
                reports[name] = RUNNERS[stage](build(STAGES[stage], settings))
                told(reports[name])
            told_already |= reports.keys() - {"train", "eval_after"}
            own = {name: report for name, report in reports.items() if name in ("train", "eval_after")}
            rows.append(_swept(assignment.partition("=")[0], value, own))
        report = Report(
            "sweep", str(config.out / "sweep"), {"trainings": len(rows)}, rows=tuple(rows),
            seconds=time.monotonic() - started_s,
        )  # fmt: skip
        save_report(report, config.out)
    return report


SWEPT = ("loss", "gap_nats", "w_mean", "ess", "avg_at_k", "reverse_kl_nats")
"""What the table of a sweep shows of each training and its evaluation, where it was measured."""


def _swept(key: str, value: str, reports: Mapping[str, Report]) -> dict[str, Any]:
    figures = {name: value for report in reports.values() for name, value in report.figures.items()}
    measured = {name: figures[name] for name in SWEPT if name in figures}
    return {key.removeprefix("train."): value, **measured, "out": reports["train"].out}


def _has_finished(config: RunConfig, name: str) -> bool:
    settings_of = {name: settings for name, _, settings in config.pipeline()}
    return name in settings_of and _is_finished(name, settings_of[name])


def _plan(config: RunConfig, told: Callable[[Report], None]) -> Report:
    """Each step's dry run, where the step that it reads from is finished; else what it waits for."""
    steps = {name: (stage, settings) for name, stage, settings in config.pipeline()}
    ready = []
    for name, (stage, settings) in steps.items():
        if config.is_multi_round and stage in ("precompute", "train"):
            continue
        needed = NEEDS.get(name)
        if needed not in steps or _is_finished(needed, steps[needed][1]):
            told(RUNNERS[stage](build(STAGES[stage], settings), dry_run=True))
            ready.append(name)
        else:
            told(Report(name, _folder_of(name, settings), {}, notes=(f"dry run: waits for {needed}",)))
        if config.is_multi_round and stage == "rollout":
            told(rounds.plan(config))
    note = f"dry run: nothing was written; {len(ready)} steps can start now: {', '.join(ready)}"
    return Report("run", str(config.out), {"steps": len(steps)}, notes=(note,))


def _is_finished(name: str, settings: dict[str, Any]) -> bool:
    """Whether the step has left its report; whether its settings are still the same is found when it runs."""
    folder = Path(_folder_of(name, settings))
    if name == "precompute":
        folder = folder / "signals" / str(settings.get("signal", "teacher"))
    return (folder / f"{name}.report.json").is_file()


def _folder_of(name: str, settings: dict[str, Any]) -> str:
    return str(settings["cache" if name in ("rollout", "precompute") else "out"])


def _summary(reports: dict[str, Report]) -> dict[str, Any]:
    """Accuracies and divergences before and after, and the seconds of every stage."""
    figures: dict[str, Any] = {}
    for name, report in reports.items():
        figures[f"{name}_seconds"] = round(report.seconds, 2)
        for key in ("avg_at_k", "reverse_kl_nats", "gap_nats"):
            if key in report.figures:
                figures[f"{name}_{key}"] = report.figures[key]
    return figures
