"""Phases: rounds whose settings differ, such as a dense teacher first and a sparse reward on what it made."""

from collections.abc import Iterator
from pathlib import Path

from lightopd.config import build, of_phase
from lightopd.pipelines.multi_round.one_round import Round, trained
from lightopd.schemas.configs import EvalConfig, ModelConfig, PrecomputeConfig, RolloutConfig, TrainConfig
from lightopd.schemas.run import RunConfig


def phases_of(config: RunConfig) -> Iterator[Round]:
    """Every phase, in order, each from the student that the one before it makes."""
    student = build(RolloutConfig, config.settings("rollout")).student
    for index in range(len(config.phases)):
        one = _phase(config, index, student)
        student = trained(of_phase(config, config.phases[index]), student, one.folder)
        yield one


def _phase(config: RunConfig, index: int, student: ModelConfig) -> Round:
    """Settings of one phase: those of the run with its own laid over, folders and a seed."""
    phase = config.phases[index]
    own = of_phase(config, phase)
    folder = phase_folder(config, index)
    cache = folder / "cache"
    rollout = build(RolloutConfig, own.settings("rollout") | {"student": student, "cache": cache})
    sampling = rollout.sampling.model_copy(update={"seed": rollout.sampling.seed + index})
    learner = own.settings("train") | {"student": student, "cache": cache, "out": folder / "train"}
    measured = {"model": trained(own, student, folder), "out": folder / "eval"}
    scoring = own.settings("precompute") | {"cache": cache}
    return Round(
        index=index,
        name=phase.name,
        folder=folder,
        student=student,
        rollout=rollout.model_copy(update={"sampling": sampling}),
        precompute=None if phase.precompute is None else build(PrecomputeConfig, scoring),
        train=build(TrainConfig, learner),
        eval=build(EvalConfig, own.settings("eval_after") | measured) if config.eval_prompts else None,
    )


def phase_folder(config: RunConfig, index: int) -> Path:
    """Folder of a phase."""
    return config.out / f"phase-{index}-{config.phases[index].name}"
