"""The words and numbers of a report: what a cache is, where it comes from, what it cost."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightopd.cache.signals.horizon import in_words
from lightopd.cache.store import Cache, Signal
from lightopd.inspection.opened import OpenedCache
from lightopd.inspection.runs import TrainedRun, read_report

STAGES = ("sft", "rollout", "precompute", "train", "eval")
EVALUATIONS = ("eval_before", "eval_after", "eval_teacher")


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the head of the page."""

    label: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation that lies beside the cache or a run."""

    run: str
    name: str
    """before, after or teacher."""
    accuracy: float
    error: float | None
    """Standard error of the accuracy."""
    rollouts: int


def tiles(opened: OpenedCache, cache: Cache) -> list[Tile]:
    """The cache in a few numbers."""
    found = opened.sql(
        "SELECT count(DISTINCT prompt_id) AS prompts, avg(truncated::INTEGER) AS truncated, "
        "avg(reward) AS reward, avg(response_tokens) AS length FROM rollouts"
    ).rows()[0]
    result = [
        Tile("rollouts", f"{cache.num_rollouts:,}", f"of {found['prompts']:,} prompts"),
        Tile("response tokens", f"{cache.num_tokens:,}", f"{_number(found['length'])} a rollout"),
        Tile("cut by the limit", _share(found["truncated"]), "of the rollouts"),
        Tile("mean reward", _number(found["reward"]), "of the verifier"),
    ]
    gaps = opened.sql(
        "SELECT signal, avg(gap) AS gap, avg(exp(logprob_tail)) AS tail FROM tokens "
        "WHERE loss_mask AND signal IS NOT NULL GROUP BY signal ORDER BY signal"
    ).rows()
    for row in gaps:
        result.append(
            Tile(f"gap to {row['signal']}", _number(row["gap"]), "nats per token, student minus signal")
        )
        result.append(Tile(f"tail of {row['signal']}", _share(row["tail"]), "probability outside the top-k"))
    return result


def consistency(cache: Cache) -> list[tuple[bool, str]]:
    """Whether each signal is what its role promises, a sentence each; false where nothing proves it."""
    manifest = cache.manifest
    lines = [_teacher_sentence(cache, name, signal) for name, signal in cache.signals.items()]
    if not cache.signals:
        lines.append((False, "No signal has been precomputed yet, so there is no teacher to compare."))
    overrides = [*manifest.overrides, *(o for s in cache.signals.values() for o in s.manifest.overrides)]
    told = dict.fromkeys(f"Overridden in {o.stage}: {o.allowed} ({o.found})." for o in overrides)
    missing = [(name, cache.missing(name)) for name in cache.signals] + [("rollouts", cache.missing())]
    gone = [
        (False, f"{len(shards)} shards of {name} are not there yet.") for name, shards in missing if shards
    ]
    return [*lines, *((False, line) for line in told), *gone]


def _teacher_sentence(cache: Cache, name: str, signal: Signal) -> tuple[bool, str]:
    manifest, sft = signal.manifest, cache.manifest.sft
    source = manifest.model.source if manifest.model else "an imported file"
    if manifest.role == "self":
        same = bool(manifest.model and cache.manifest.sampler) and (
            manifest.model.identity == cache.manifest.sampler.identity  # type: ignore[union-attr]
        )
        return (
            same,
            f"{name}: {'the student that sampled' if same else 'not the student that sampled'} ({source}).",
        )
    if manifest.role != "teacher":
        return True, f"{name}: a {manifest.role} ({source}), which is held to nothing."
    if sft.teacher is None:
        known = f"declared by name only ({sft.name})" if sft.name else "unknown"
        return (
            False,
            f"{name}: the teacher of the student's fine-tuning data is {known}, so nothing is proven.",
        )
    same = manifest.model is not None and manifest.model.identity == sft.teacher.identity
    if not same:
        return False, f"{name}: {source} is not the model that wrote the student's fine-tuning data."
    how = "recorded by the sft stage" if sft.proof == "recorded" else "as the user declared"
    return (
        sft.proof == "recorded",
        f"{name}: {source} is the very model that wrote the student's fine-tuning data, {how}.",
    )


def lineage(cache: Cache, runs: list[TrainedRun]) -> list[tuple[str, str]]:
    """Who made what, one step a line: (step, what)."""
    manifest = cache.manifest
    steps = []
    if manifest.sft.teacher or manifest.sft.name:
        teacher = manifest.sft.teacher.source if manifest.sft.teacher else manifest.sft.name
        steps.append(("teacher of the fine-tuning data", f"{teacher} ({manifest.sft.proof})"))
    if manifest.sampler:
        steps.append(
            ("student that sampled", f"{manifest.sampler.source} ({manifest.sampler.identity[:12]})")
        )
    if manifest.sampling:
        sampling = manifest.sampling
        steps.append(
            (
                "sampling",
                f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, at most "
                f"{sampling.max_tokens} tokens, {sampling.n} a prompt, seed {sampling.seed}",
            )
        )
    for name, signal in cache.signals.items():
        own = signal.manifest
        source = f"{own.model.source} ({own.model.identity[:12]})" if own.model else "imported"
        kind = own.context.get("kind", "plain")
        shown = "" if kind == "plain" else f", shown another prompt ({kind})"
        shown += "" if own.horizon is None else f", the {in_words(own.horizon)} of each response"
        states = f", hidden states ({own.hidden.format})" if own.hidden else ""
        steps.append(
            (f"signal {name}", f"{own.role}: {source}, top-{own.top_k}, tail {own.tail}{states}{shown}")
        )
    for run in runs:
        student = run.path / "student" / "lightopd_student.json"
        state = "finished" if run.is_finished else f"at step {len(run.metrics)}"
        made = f", identity {_identity(student)}" if student.is_file() else ""
        steps.append((f"run {run.name}", f"{run.path} ({state}{made})"))
    return steps


def _identity(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["student"]["identity"])[:12]
    except (ValueError, KeyError, TypeError):
        return "unreadable"


def notes(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[str]:
    """What the stages said that their readers must not miss."""
    places = [("rollout", opened.path)]
    places += [("precompute", opened.path / "signals" / name) for name in cache.signals]
    told = [
        f"{stage}: {note}" for stage, place in places for note in read_report(place, stage).get("notes", ())
    ]
    return told + [f"{run.name}: {note}" for run in runs for note in run.report.get("notes", ())]


def costs(opened: OpenedCache, cache: Cache, runs: list[TrainedRun]) -> list[dict[str, Any]]:
    """Seconds of every stage whose report is there: stage, seconds."""
    found = [("rollout", read_report(opened.path, "rollout"))]
    found += [
        (f"precompute {name}", read_report(opened.path / "signals" / name, "precompute"))
        for name in cache.signals
    ]
    found += [(f"train {run.name}", run.report) for run in runs]
    found += [(f"{name} {run}", report) for run, name, report in _evaluation_reports(opened, runs)]
    root = opened.path.parent
    found.append(("sft", read_report(root / "sft", "sft")))
    rows = [
        {"stage": stage, "seconds": float(report["seconds"])}
        for stage, report in found
        if "seconds" in report
    ]
    unfinished = [run for run in runs if not run.is_finished and run.metrics]
    rows += [
        {"stage": f"train {run.name} (so far)", "seconds": run.metrics[-1].get("seconds", 0.0)}
        for run in unfinished
    ]
    return rows


def evaluations(opened: OpenedCache, runs: list[TrainedRun]) -> list[Evaluation]:
    """Accuracies that were measured before and after, and the teacher's."""
    return [
        Evaluation(
            run,
            name.removeprefix("eval_"),
            float(report["figures"]["avg_at_k"]),
            report["figures"].get("standard_error"),
            int(report["figures"].get("rollouts", 0)),
        )
        for run, name, report in _evaluation_reports(opened, runs)
        if report.get("figures", {}).get("avg_at_k") is not None
    ]


def _evaluation_reports(
    opened: OpenedCache, runs: list[TrainedRun]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(run, folder's name, report) of every evaluation beside the runs, or beside the cache."""
    roots = {run.path.resolve().parent: run.name for run in runs} or {
        opened.path.resolve().parent: opened.path.name
    }
    for root, run in roots.items():
        for name in EVALUATIONS:
            report = read_report(root / name, "eval")
            if report:
                yield run, name, report


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if value >= 0.0001 or value == 0 else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
