"""Rounds and phases: the trained student samples again, the teacher scores again, and is trained again.

    OUT/round-000/{cache,train,eval}   OUT/round-001/...   OUT/student
    OUT/phase-0-NAME/{cache,train,eval}   OUT/phase-1-NAME/...   OUT/student

The stages are those of a single run; each round's student names the cache it was trained on and keeps its
fine-tuning teacher, so every check holds in every round. With rounds of one step this is live distillation.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import JsonValue

from lightopd.config import build
from lightopd.engines.kinds import load_engine
from lightopd.errors import OutputError
from lightopd.files import json_bytes, write_atomically
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.pipelines import evaluate, precompute, rollout, train
from lightopd.pipelines.multi_round.equal_rounds import planned_round, rounds_of
from lightopd.pipelines.multi_round.kept_engines import KeptEngines
from lightopd.pipelines.multi_round.one_round import Round
from lightopd.pipelines.multi_round.phases import phases_of
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.reports import Report, finished_report, save_report
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import RolloutConfig, TrainConfig
from lightopd.schemas.run import RunConfig
from lightopd.training.checkpoints.export import export_student
from lightopd.training.checkpoints.run_identity import DECIDES_NOTHING

log = logging.getLogger(__name__)

MADE_FROM = "round.json"
FIGURES = ("gap_nats", "ess", "overlap", "chi2", "log_ratio_lost", "avg_at_k", "reverse_kl_nats")
"""What a round takes over from the reports of its stages: the gap before, the drift of what it exported."""


def run(
    config: RunConfig, *, told: Callable[[Report], None] = lambda _: None, load: LoadEngine = load_engine
) -> Report:
    """Run rounds until the steps are done, or every phase; `told` hears one report for each.

    Finished ones are skipped.

    Raises:
        OutputError: a finished round was made under other settings; the message names them.
        LightopdError: see the stages; what is finished stays.
    """
    started_s = time.monotonic()
    reports: list[Report] = []
    keeps = config.rounds is not None and config.rounds.keep_teacher
    folder = None
    with KeptEngines(load) as kept:
        for one in rounds_of(config, config.rounds, reports) if config.rounds else phases_of(config):
            reports.append(_run_round(one, kept if keeps else load, load))
            told(reports[-1])
            if folder is not None:
                # A finished round resumes from nothing: its student stays, its checkpoints go.
                shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)
            folder = one.folder
    assert folder is not None, "a run has a step, and one phase at least"
    export_student(folder / "train" / "student", config.out / "student")
    report = _report(config, reports, started_s)
    save_report(report, config.out)
    return report


def plan(config: RunConfig) -> Report:
    """What the rounds or phases would do, from the settings alone."""
    if config.rounds is None:
        steps = {one.name or "": one.train.steps for one in phases_of(config)}
        named = ", ".join(f"{name} ({count} steps)" for name, count in steps.items())
        figures: dict[str, JsonValue] = {"phases": len(steps), "steps": sum(steps.values())}
        return Report("phases", str(config.out), figures, notes=(f"dry run: nothing was written; {named}",))
    settings = build(TrainConfig, config.settings("train"))
    least = -(-config.rounds.steps // settings.steps)
    first = planned_round(config, config.rounds, 0, 0)
    early = ", more where the cache goes stale before" if first.train.staleness.stop_when_stale else ""
    return Report(
        stage="rounds",
        out=str(config.out),
        figures={
            "rounds": least,
            "steps": config.rounds.steps,
            "steps_per_round": min(settings.steps, config.rounds.steps),
            "rollouts_trained_on_per_round": settings.steps * settings.batch_sequences,
        },
        notes=(f"dry run: nothing was written; {least} rounds{early}",),
    )


def _run_round(one: Round, load_teacher: LoadEngine, load: LoadEngine) -> Report:
    started_s = time.monotonic()
    decisive = _decisive(one, _begun(one.folder))
    made_from = _claim(one.folder, decisive)
    finished = finished_report("round", one.folder, made_from)
    if finished is not None:
        return finished
    before = one.train.optimizer.steps_before
    log.info("%s: from step %d, %d at most", one.folder.name, before, one.train.steps)
    reports = [rollout.run(one.rollout, load=load)]
    if one.precompute is not None:
        reports.append(precompute.run(one.precompute, load=load_teacher))
    reports.append(train.run(one.train))
    if one.eval is not None and before + _count(reports[-1], "steps") >= one.eval_from_step:
        reports.append(evaluate.run(one.eval, load=load))
    report = replace(_round_report(one, reports, started_s), made_from=made_from)
    write_atomically(one.folder / MADE_FROM, json_bytes(decisive))
    save_report(report, one.folder)
    return report


def _claim(folder: Path, decisive: dict[str, JsonValue]) -> str:
    """Hash of what the round is made from, as it was written down when the round was finished.

    A folder with a finished round of another run is refused; an unfinished one is for its stages to judge.
    A setting that is absent there and none or empty here is the same: a newer version may know more settings.

    Raises:
        OutputError: names every setting that differs.
    """
    before = _begun(folder)
    if not before:
        return canonical_hash(decisive)
    names = [name for name in {**before, **decisive} if not _agree(before.get(name), decisive.get(name))]
    if names:
        raise OutputError(
            f"{folder} was made under other settings ({', '.join(names)} differ); set these back, or "
            "name another out folder"
        )
    return canonical_hash(before)


def _begun(folder: Path) -> dict[str, JsonValue]:
    """The settings that a round's folder was made under; empty where none was."""
    if not (folder / MADE_FROM).exists():
        return {}
    settings: dict[str, JsonValue] = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    return settings


def _agree(before: JsonValue, now: JsonValue) -> bool:
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_agree(before.get(name), now.get(name)) for name in {**before, **now})
    return now in (None, []) if before is None else before == now


def _decisive(one: Round, begun: Mapping[str, JsonValue] = MappingProxyType({})) -> dict[str, JsonValue]:
    """By name: which student and teacher, and every setting that decides numbers; folders do not matter.

    Args:
        begun: those of a round that is resumed: it may know its models by an earlier spelling.
    """
    settings: dict[str, JsonValue] = {
        "student": fingerprint_model(one.student).known_as(begun.get("student"))
    }
    if one.precompute is not None:
        teacher = fingerprint_model(one.precompute.teacher)
        settings["teacher"] = teacher.known_as(begun.get("teacher"))
    places = {"student", "teacher", "model", "cache", "out", "continue_from", "allow"}
    for name in ("rollout", "precompute", "train", "eval"):
        config: Any = getattr(one, name)
        plain = {} if config is None else config.model_dump(mode="json", exclude=places)
        kept = {key: value for key, value in plain.items() if key == "steps" or key not in DECIDES_NOTHING}
        settings |= {f"{name}.{key}": value for key, value in kept.items()}
    settings["train.is_carried"] = one.train.continue_from is not None
    if one.train.best is not None:  # it decides which student samples next, and is decided by these
        chosen = one.train.model_dump(mode="json", include={"best", "held_out_every", "accuracy"})
        settings["train.best with held_out_every and accuracy"] = chosen
    return settings


def _round_report(one: Round, reports: list[Report], started_s: float) -> Report:
    found = {
        key: report.figures[key]
        for report in reports
        for key in FIGURES
        # Accuracy during training may be that of other prompts: a column holds one or the other.
        if key in report.figures and not (key == "avg_at_k" and report.stage == "train" and one.eval)
    }
    seconds = time.monotonic() - started_s
    trained_by = next(report for report in reports if report.stage == "train")
    figures: dict[str, JsonValue] = {
        **({"round": one.index} if one.name is None else {"phase": one.name}),
        "rollouts": reports[0].figures["rollouts"],
        "response_tokens": reports[0].figures["response_tokens"],
        "steps": trained_by.figures["steps"],
        **{key: found[key] for key in FIGURES if key in found},
        "seconds": round(seconds, 2),
    }
    later = reports[reports.index(trained_by) :]
    notes = tuple(dict.fromkeys(note for report in later for note in report.notes))
    return Report("round", str(one.folder), figures, notes=notes, seconds=seconds)


def _report(config: RunConfig, reports: list[Report], started_s: float) -> Report:
    """Totals, the last round's figures, and one row for each round."""
    columns = list(dict.fromkeys(key for report in reports for key in report.figures))
    last = reports[-1].figures
    seconds = time.monotonic() - started_s
    base = build(RolloutConfig, config.settings("rollout")).student.path
    laid = (f"the student is an adapter on {base}: give that model, and this folder as its adapter",)
    return Report(
        stage=_kind(config),
        out=str(config.out / "student"),
        figures={
            _kind(config): len(reports),
            "steps": sum(_count(report, "steps") for report in reports),
            "rollouts": sum(_count(report, "rollouts") for report in reports),
            **{key: last[key] for key in ("gap_nats", "avg_at_k", "reverse_kl_nats") if key in last},
            "seconds": round(seconds, 2),
        },
        rows=tuple({key: report.figures.get(key) for key in columns} for report in reports),
        notes=laid if config.leaves_adapter() else (),
        seconds=seconds,
    )


def _count(report: Report, name: str) -> int:
    value = report.figures[name]
    assert isinstance(value, int)
    return value


def _kind(config: RunConfig) -> str:
    return "rounds" if config.rounds else "phases"
