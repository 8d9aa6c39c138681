"""The pipeline of stages from one YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lightopd.schemas.base import StrictModel
from lightopd.schemas.configs import (
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    PromptsConfig,
    RolloutConfig,
    SftConfig,
    StageConfig,
    TrainConfig,
    as_prompts,
)
from lightopd.schemas.rewriting import RewriteConfig

STAGES: dict[str, type[StrictModel]] = {
    "sft": SftConfig,
    "rollout": RolloutConfig,
    "rewrite": RewriteConfig,
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
"""Config of each stage, in the order they run."""


class RoundsConfig(StrictModel):
    """Rounds of rollout, precompute and train, each from the student that the round before it made."""

    steps: int = Field(ge=1)
    """Optimiser steps over all rounds; `train.steps` is the most of one round."""
    prompts_per_round: int | None = Field(None, ge=1)
    """Prompts of a round, in their order, and after the last the first. None: all, every round."""
    optimizer: Literal["carried", "fresh"] = "carried"
    """Whether the optimiser's moments are carried from round to round, or begin at zero in each."""
    keep_teacher: bool = False
    """Keep the teacher loaded between rounds, as rounds of one step want, at the price of its memory."""
    eval_every: int = Field(1, ge=1)
    """Rounds between evaluations on `eval_prompts`; the last round always makes one."""


class PhaseConfig(StrictModel):
    """One rollout, precompute and train with settings of its own, from the student of the phase before."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """Name of the phase, in its folder and in the report."""
    rollout: dict[str, Any] = Field({})
    """Laid over the run's `rollout`."""
    precompute: dict[str, Any] | None = Field({})
    """Laid over the run's `precompute`; none: no teacher scores, as for a reward alone."""
    train: dict[str, Any] = Field({})
    """Laid over the run's `train`."""


class RunConfig(StageConfig):
    """A run file: what the stages share at the top, and a section with the settings of each stage."""

    out: Path
    """Folder of the run; every stage writes below it."""
    teacher: ModelConfig
    """The model that is distilled."""
    student: ModelConfig
    """The base student where there is a `sft` section, else the fine-tuned student."""
    prompts: PromptsConfig
    """Prompts of `sft` and `rollout`, unless their section names others."""
    eval_prompts: PromptsConfig | None = None
    """Held-out prompts; without them nothing is evaluated."""
    eval_divergence: bool = False
    """Also measure KL to the teacher, over the full vocabulary, before and after training."""
    sft: dict[str, Any] | None = None
    """Settings of the sft stage; left out, the student is taken as fine-tuned."""
    rollout: dict[str, Any] = Field({})
    """Settings of the rollout stage."""
    precompute: dict[str, Any] = Field({})
    """Settings of the precompute stage."""
    train: dict[str, Any] = Field({})
    """Settings of the train stage."""
    eval: dict[str, Any] = Field({})
    """Settings of the evaluations before and after training, and of the teacher."""
    rounds: RoundsConfig | None = None
    """Repeat rollout, precompute and train, each round from the student of the one before; none: once."""
    phases: tuple[PhaseConfig, ...] = ()
    """Rollout, precompute and train once for each of these, in order; none: once, by the sections alone."""

    _prompts = field_validator("prompts", "eval_prompts", mode="before")(as_prompts)

    @model_validator(mode="after")
    def _rounds_train_in_this_process(self) -> "RunConfig":
        trainings = [self.train, *(phase.train for phase in self.phases)]
        one_device = all((own.get("devices", 1), own.get("nodes", 1)) == (1, 1) for own in trainings)
        if self.is_multi_round and not one_device:
            raise ValueError(
                "rounds and phases train on one device, in the process that samples and scores; take devices "
                "and nodes out of train, or leave rounds and phases out and run the stages one by one"
            )
        return self

    @model_validator(mode="after")
    def _carried_moments_belong_to_what_stays(self) -> "RunConfig":
        adapter = self.train.get("adapter")
        merges = isinstance(adapter, Mapping) and adapter.get("merge")
        if merges and self.rounds and self.rounds.optimizer == "carried":
            raise ValueError(
                "a round that merges its adapter leaves nothing that the optimiser's moments belong to; "
                "set rounds.optimizer to fresh, or take merge out of train.adapter"
            )
        return self

    @model_validator(mode="after")
    def _rounds_average_nothing(self) -> "RunConfig":
        if self.rounds and self.train.get("ema_decay"):
            raise ValueError(
                "the average of ema_decay would begin anew in every round, and its student sample the next; "
                "take ema_decay out of train, or leave rounds out"
            )
        return self

    @model_validator(mode="after")
    def _privacy_is_of_one_training(self) -> "RunConfig":
        trainings = (self.train, *(phase.train for phase in self.phases))
        if self.is_multi_round and any(own.get("privacy") for own in trainings):
            raise ValueError(
                "privacy spent in several trainings on the same prompts adds up, which nothing counts; take "
                "privacy out of train, or leave rounds and phases out"
            )
        return self

    @model_validator(mode="after")
    def _phases_are_told_apart(self) -> "RunConfig":
        names = [phase.name for phase in self.phases]
        if self.phases and self.rounds:
            raise ValueError("rounds repeat settings and phases have their own; leave one of them out")
        if len(set(names)) < len(names):
            raise ValueError(f"two phases have the same name: {', '.join(names)}")
        if any("adapter" in phase.train for phase in self.phases):
            raise ValueError("all phases train the same weights; set adapter in train, not in a phase")
        return self

    @property
    def is_multi_round(self) -> bool:
        """Whether rollout, precompute and train are run more than once, by rounds or phases."""
        return bool(self.rounds or self.phases)

    def pipeline(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(name, stage, settings) of every step, in order; the settings build that stage's config.

        With rounds, `rollout`, `precompute` and `train` are those of round 0; with phases, what these share.
        Each round and phase evaluates itself.
        """
        steps = [("sft", "sft")] if self.sft is not None else []
        steps += [("rollout", "rollout"), ("precompute", "precompute")]
        steps += [("eval_teacher", "eval"), ("eval_before", "eval")] if self.eval_prompts else []
        steps += [("train", "train")]
        steps += [("eval_after", "eval")] if self.eval_prompts and not self.is_multi_round else []
        return [(name, stage, self.settings(name)) for name, stage in steps]

    def settings(self, name: str) -> dict[str, Any]:
        """Settings of one step: what the run shares, with the step's section laid on top."""
        section: Mapping[str, Any] = getattr(self, "eval" if name.startswith("eval") else name) or {}
        if name == "train" and isinstance(section.get("accuracy"), Mapping):
            section = {**section, "accuracy": self._accuracy(section["accuracy"])}
        return {**self._shared(name), **section}

    def _accuracy(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracy during training: as the evaluations around it, unless its section says otherwise."""
        evaluation = self.settings("eval_after")
        shared = {name: evaluation[name] for name in ("prompts", "sampling") if evaluation.get(name)}
        evaluated, sampling = shared.get("sampling"), own.get("sampling")
        if isinstance(evaluated, Mapping) and isinstance(sampling, Mapping):
            own = {**own, "sampling": {**evaluated, **sampling}}
        return {**shared, **own}

    def sampled_by(self) -> Any:
        """The fine-tuned student, which samples first."""
        return {"path": str(self.out / "sft" / "student")} if self.sft is not None else self.student

    def _shared(self, name: str) -> dict[str, Any]:
        sampled_by = self.sampled_by()
        cache, allow = self.out / "cache", self.allow
        if name == "sft":
            student = _as_trained(self.student)
            return {"prompts": self.prompts, "teacher": self.teacher, "student": student,
                    "out": self.out / "sft", "allow": allow}  # fmt: skip
        if name == "rollout":
            return {"prompts": self.prompts, "student": sampled_by, "cache": cache, "allow": allow}
        if name == "precompute":
            return {"cache": cache, "teacher": self.teacher, "allow": allow}
        if name == "train":
            student = _as_trained(sampled_by)
            return {"cache": cache, "student": student, "out": self.out / "train", "allow": allow}
        beside = self._trained_in().parent if name == "eval_after" else self.out
        return {"prompts": self.eval_prompts, "out": beside / name, **self._evaluated(name, sampled_by)}

    def _trained_in(self) -> Path:
        """Folder of the training, which its section may name."""
        return Path(self.train.get("out", self.out / "train"))

    def leaves_adapter(self) -> bool:
        """Whether training exports an adapter, to be laid on the student that it began with."""
        adapter = self.train.get("adapter")
        return adapter is not None and not adapter.get("merge")

    def _evaluated(self, name: str, sampled_by: Any) -> dict[str, Any]:
        folder = self._trained_in() / "student"
        trained: dict[str, Any] = {"path": str(folder)}
        if self.leaves_adapter():
            began = sampled_by.model_dump() if isinstance(sampled_by, ModelConfig) else sampled_by
            trained = {**began, "adapter": folder}
        model = {"eval_after": trained, "eval_teacher": self.teacher}.get(name, sampled_by)
        measured = {"teacher": self.teacher} if self.eval_divergence and name != "eval_teacher" else {}
        return {"model": model, **measured}


def _as_trained(student: Any) -> Any:
    """The student without the number format that it samples in: it is trained in float32."""
    if isinstance(student, ModelConfig):
        return student.model_copy(update={"dtype": "auto"})
    return {k: v for k, v in student.items() if k != "dtype"} if isinstance(student, Mapping) else student
