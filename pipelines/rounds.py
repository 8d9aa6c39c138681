"""Rounds: the trained student samples again, the teacher scores again, and training resumes.

    OUT/round-000/{cache,train,eval}   OUT/round-001/...   OUT/student

The stages are those of a single run; each round's student names the cache it was trained on and keeps its
fine-tuning teacher, so every check holds in every round. With rounds of one step this is live distillation.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from lightopd.config import build, merged
from lightopd.engines.base import Engine
from lightopd.engines.kinds import load_engine
from lightopd.errors import OutputError
from lightopd.files import json_bytes, write_atomically
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.pipelines import evaluate, precompute, rollout, train
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.reports import Report, finished_report, save_report
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import (
    EngineConfig,
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    RolloutConfig,
    TrainConfig,
)
from lightopd.schemas.run import RoundsConfig, RunConfig
from lightopd.training.checkpoints.export import export_student
from lightopd.training.checkpoints.run_identity import DECIDES_NOTHING

log = logging.getLogger(__name__)

MADE_FROM = "round.json"
FIGURES = ("gap_nats", "ess", "overlap", "chi2", "log_ratio_lost", "avg_at_k", "reverse_kl_nats")
"""What a round takes over from the reports of its stages: the gap before, the drift of what it exported."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round with its settings, before it is run."""

    index: int
    folder: Path
    student: ModelConfig
    """The one that samples and is trained: the last round's, or the fine-tuned one."""
    rollout: RolloutConfig
    precompute: PrecomputeConfig
    train: TrainConfig
    eval: EvalConfig | None
    """None where there are no prompts to evaluate on."""


def run(
    config: RunConfig, *, told: Callable[[Report], None] = lambda _: None, load: LoadEngine = load_engine
) -> Report:
    """Run rounds until the steps are done, skipping finished ones; `told` hears one report for each.

    Raises:
        OutputError: a finished round was made under other settings; the message names them.
        LightopdError: see the stages; what is finished stays.
    """
    assert config.rounds is not None
    started_s = time.monotonic()
    reports: list[Report] = []
    with KeptEngines(load) as kept:
        for one in _rounds(config, config.rounds, reports):
            reports.append(_run_round(config, one, kept if config.rounds.keep_teacher else load, load))
            told(reports[-1])
            _drop_checkpoints(config, one.index - 1)
    export_student(_folder(config, len(reports) - 1) / "train" / "student", config.out / "student")
    report = _report(config, reports, started_s)
    save_report(report, config.out)
    return report


def plan(config: RunConfig) -> Report:
    """What the rounds would do, from the settings alone."""
    assert config.rounds is not None
    settings = build(TrainConfig, config.settings("train"))
    least = -(-config.rounds.steps // settings.steps)
    first = _round(config, config.rounds, 0, 0)
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


def _rounds(config: RunConfig, settings: RoundsConfig, done: list[Report]) -> Iterator[Round]:
    """Rounds until the steps are done; `done` grows while they are run."""
    while (steps := sum(_count(report, "steps") for report in done)) < settings.steps:
        yield _round(config, settings, len(done), steps)


def _round(config: RunConfig, settings: RoundsConfig, index: int, steps_before: int) -> Round:
    """Settings of one round: those of the stages, with folders, prompts, seed and place of its own."""
    folder = _folder(config, index)
    first = build(RolloutConfig, config.settings("rollout")).student
    student = _trained(config, first, _folder(config, index - 1)) if index else first
    stages = {name: config.settings(name) for name in ("rollout", "precompute", "train")}
    stages["rollout"] |= {"student": student, "cache": folder / "cache"}
    stages["precompute"] |= {"cache": folder / "cache"}
    stages["train"] |= {"student": student, "cache": folder / "cache", "out": folder / "train"}
    measured = {
        **config.settings("eval_after"),
        "model": _trained(config, student, folder),
        "out": folder / "eval",
    }
    return Round(
        index=index,
        folder=folder,
        student=student,
        rollout=_sampling(build(RolloutConfig, stages["rollout"]), settings, index),
        precompute=build(PrecomputeConfig, stages["precompute"]),
        train=_training(config, settings, stages["train"], index, steps_before),
        eval=build(EvalConfig, measured) if config.eval_prompts else None,
    )


def _trained(config: RunConfig, began: ModelConfig, round_folder: Path) -> ModelConfig:
    """The student that a round makes: a plain folder, or an adapter on the base of the one it began with."""
    folder = round_folder / "train" / "student"
    if config.leaves_adapter():
        return began.model_copy(update={"adapter": folder})
    return began.model_copy(update={"path": str(folder), "revision": None, "adapter": None})


def _sampling(config: RolloutConfig, settings: RoundsConfig, index: int) -> RolloutConfig:
    """The next prompts, drawn with a seed of the round's own."""
    sampling = config.sampling.model_copy(update={"seed": config.sampling.seed + index})
    if settings.prompts_per_round is None:
        return config.model_copy(update={"sampling": sampling})
    taken = {
        "limit": settings.prompts_per_round,
        "skip": config.prompts.skip + index * settings.prompts_per_round,
    }
    return config.model_copy(
        update={"sampling": sampling, "prompts": config.prompts.model_copy(update=taken)}
    )


def _training(
    config: RunConfig, settings: RoundsConfig, stage: dict[str, Any], index: int, steps_before: int
) -> TrainConfig:
    """One round of training: it stops when the cache is stale, and its learning rate is that of the whole."""
    plain = build(TrainConfig, merged({"staleness": {"stop_when_stale": True}}, stage))
    schedule = {"steps_before": steps_before}
    if plain.optimizer.schedule != "constant":
        schedule["steps_in_all"] = settings.steps
    goes_on = index > 0 and settings.optimizer == "carried"
    return plain.model_copy(
        update={
            "steps": min(plain.steps, settings.steps - steps_before),
            "optimizer": plain.optimizer.model_copy(update=schedule),
            "continue_from": _folder(config, index - 1) / "train" if goes_on else None,
        }
    )


def _run_round(config: RunConfig, one: Round, load_teacher: LoadEngine, load: LoadEngine) -> Report:
    assert config.rounds is not None
    started_s = time.monotonic()
    decisive = _decisive(one)
    made_from = _claim(one.folder, decisive)
    finished = finished_report("round", one.folder, made_from)
    if finished is not None:
        return finished
    log.info("round %d: from step %d of %d", one.index, one.train.optimizer.steps_before, config.rounds.steps)
    reports = [
        rollout.run(one.rollout, load=load),
        precompute.run(one.precompute, load=load_teacher),
        train.run(one.train),
    ]
    is_last = one.train.optimizer.steps_before + _count(reports[2], "steps") >= config.rounds.steps
    if one.eval is not None and (is_last or (one.index + 1) % config.rounds.eval_every == 0):
        reports.append(evaluate.run(one.eval, load=load))
    report = replace(_round_report(one, reports, started_s), made_from=made_from)
    write_atomically(one.folder / MADE_FROM, json_bytes(decisive))
    save_report(report, one.folder)
    return report


def _claim(folder: Path, decisive: dict[str, JsonValue]) -> str:
    """Hash of what the round is made from, as it was written down when the round was finished.

    A folder with a finished round of another run is refused; an unfinished one is for its stages to judge.
    A setting that is absent there and none here is the same: a newer version may know more settings.

    Raises:
        OutputError: names every setting that differs.
    """
    if not (folder / MADE_FROM).exists():
        return canonical_hash(decisive)
    before = json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))
    names = [name for name in {**before, **decisive} if before.get(name) != decisive.get(name)]
    if names:
        raise OutputError(
            f"{folder} was made under other settings ({', '.join(names)} differ); set these back, or "
            "name another out folder"
        )
    return canonical_hash(before)


def _decisive(one: Round) -> dict[str, JsonValue]:
    """By name: which student and teacher, and every setting that decides numbers; folders do not matter."""
    settings: dict[str, JsonValue] = {
        "student": fingerprint_model(one.student).identity,
        "teacher": fingerprint_model(one.precompute.teacher).identity,
    }
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
    figures: dict[str, JsonValue] = {
        "round": one.index,
        "rollouts": reports[0].figures["rollouts"],
        "response_tokens": reports[0].figures["response_tokens"],
        "steps": reports[2].figures["steps"],
        **{key: found[key] for key in FIGURES if key in found},
        "seconds": round(seconds, 2),
    }
    notes = tuple(dict.fromkeys(note for report in reports[2:] for note in report.notes))
    return Report("round", str(one.folder), figures, notes=notes, seconds=seconds)


def _report(config: RunConfig, reports: list[Report], started_s: float) -> Report:
    """Totals, the last round's figures, and one row for each round."""
    columns = list(dict.fromkeys(key for report in reports for key in report.figures))
    last = reports[-1].figures
    seconds = time.monotonic() - started_s
    base = build(RolloutConfig, config.settings("rollout")).student.path
    laid = (f"the student is an adapter on {base}: give that model, and this folder as its adapter",)
    return Report(
        stage="rounds",
        out=str(config.out / "student"),
        figures={
            "rounds": len(reports),
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


def _drop_checkpoints(config: RunConfig, index: int) -> None:
    """The next round is finished: nothing resumes from the checkpoints of this one; its student stays."""
    if index >= 0:
        shutil.rmtree(_folder(config, index) / "train" / "checkpoints", ignore_errors=True)


def _folder(config: RunConfig, index: int) -> Path:
    return config.out / f"round-{index:03d}"


class KeptEngines:
    """A `load` that loads each model once and frees all at the end, for rounds shorter than loading is."""

    def __init__(self, load: LoadEngine) -> None:
        self._load = load
        self._engines: dict[str, Engine] = {}

    def __enter__(self) -> "KeptEngines":
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __call__(self, engine: EngineConfig, model: ModelConfig) -> Engine:
        """The engine of these settings, loaded by the first call; the stage's `close` leaves it open."""
        key = engine.model_dump_json() + model.model_dump_json()
        if key not in self._engines:
            self._engines[key] = self._load(engine, model)
        kept: Engine = _LeftOpen(self._engines[key])
        return kept


class _LeftOpen:
    """An engine whose `close` does nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Leave the model loaded."""
