"""One round: a student's rollouts, a teacher's scores, the training that makes the next student."""

from dataclasses import dataclass
from pathlib import Path

from lightopd.schemas.configs import (
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    RolloutConfig,
    TrainConfig,
)
from lightopd.schemas.run import RunConfig


@dataclass(frozen=True, slots=True)
class Round:
    """One round or phase with its settings, before it is run."""

    index: int
    folder: Path
    student: ModelConfig
    """The one that samples and is trained: the last round's, or the fine-tuned one."""
    rollout: RolloutConfig
    precompute: PrecomputeConfig | None
    """None where no teacher scores."""
    train: TrainConfig
    eval: EvalConfig | None
    """None where there are no prompts to evaluate on."""
    eval_from_step: int = 0
    """Steps of all rounds, this one's included, from which it makes an evaluation."""
    name: str | None = None
    """Of a phase; rounds have numbers."""


def trained(config: RunConfig, began: ModelConfig, folder: Path) -> ModelConfig:
    """The student that a round in `folder` makes: plain, or an adapter on the base that it began with."""
    student = folder / "train" / "student"
    if config.leaves_adapter():
        return began.model_copy(update={"adapter": student})
    return began.model_copy(update={"path": str(student), "revision": None, "adapter": None})
