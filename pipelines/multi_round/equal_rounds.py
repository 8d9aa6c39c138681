"""Rounds of the same settings: each has the next prompts and a seed of its own, until the steps are done."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightopd.config import build, merged
from lightopd.pipelines.multi_round.one_round import Round, trained
from lightopd.pipelines.shared.reports import Report
from lightopd.schemas.configs import EvalConfig, PrecomputeConfig, RolloutConfig, TrainConfig
from lightopd.schemas.run import RoundsConfig, RunConfig


def rounds_of(config: RunConfig, settings: RoundsConfig, done: list[Report]) -> Iterator[Round]:
    """Rounds until the steps are done; `done` grows while they are run."""
    while (steps := sum(int(str(report.figures["steps"])) for report in done)) < settings.steps:
        yield planned_round(config, settings, len(done), steps)


def planned_round(config: RunConfig, settings: RoundsConfig, index: int, steps_before: int) -> Round:
    """Settings of one round: those of the stages, with folders, prompts, seed and place of its own."""
    folder = round_folder(config, index)
    first = build(RolloutConfig, config.settings("rollout")).student
    student = trained(config, first, round_folder(config, index - 1)) if index else first
    stages = {name: config.settings(name) for name in ("rollout", "precompute", "train")}
    stages["rollout"] |= {"student": student, "cache": folder / "cache"}
    stages["precompute"] |= {"cache": folder / "cache"}
    stages["train"] |= {"student": student, "cache": folder / "cache", "out": folder / "train"}
    measured = {
        **config.settings("eval_after"),
        "model": trained(config, student, folder),
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
        eval_from_step=0 if (index + 1) % settings.eval_every == 0 else settings.steps,
    )


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
            "continue_from": round_folder(config, index - 1) / "train" if goes_on else None,
        }
    )


def round_folder(config: RunConfig, index: int) -> Path:
    """Folder of a round."""
    return config.out / f"round-{index:03d}"
