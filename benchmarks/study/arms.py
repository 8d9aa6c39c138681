"""The arms of the study: YAML files laid over a regime's run file, and the runs that each stands for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue

from lightopd.config import build, merged, parse_set, read_yaml
from lightopd.pipelines import RECIPES
from lightopd.schemas.base import StrictModel

STUDY = RECIPES / "study"
TUNING_SEED = 1000
"""Seed of the runs that a setting is chosen by; no measured run has it."""

Settings = Mapping[str, Any]
Grid = dict[str, tuple[JsonValue, ...]]


class Arm(StrictModel):
    """One line of the study: a way to train, in some regimes, at some settings."""

    title: str
    """What it is, for the tables."""
    questions: tuple[int, ...]
    """Numbers of the questions that it helps to answer."""
    regimes: tuple[str, ...] = ("small_gap",)
    """Regimes in which it is run."""
    kind: Literal["offline", "rounds", "sft", "trl", "teacher", "untrained"] = "offline"
    """`rounds` samples again; `sft` goes on with the teacher's answers to its prompts; `trl` is a peer;
    `teacher` and `untrained` train nothing."""
    method: str | None = None
    """A shipped recipe whose objective is taken."""
    scorer: Literal["teacher", "other_teacher", "other_order"] = "teacher"
    """Which teacher of the regime scores: the one of the fine-tuning, one of another seed, or one that was
    trained to write other answers."""
    run: dict[str, Any] = Field({})
    """Laid over the regime's run file."""
    grid: Grid = Field({})
    """Settings of the run of which every combination is measured."""
    tune: Grid = Field({})
    """Settings of which the best on the validation prompts is measured, chosen for every combination anew."""
    tuned_like: str | None = None
    """Arm whose chosen settings are taken, where a search of its own is too dear."""
    signals: dict[str, dict[str, JsonValue]] = Field({})
    """Signals beside the teacher's, by name, scored by the student at rollout."""
    measures: tuple[Literal["gradient_gap"], ...] = ()
    """Measures of the trained student beside accuracy and KL."""
    seeds: int = Field(5, ge=1)
    """Seeds that are measured."""

    @property
    def trains(self) -> bool:
        """Whether what is evaluated is a model of its own."""
        return self.kind not in ("teacher", "untrained")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of an arm."""

    arm: str
    regime: str
    grid: tuple[tuple[str, JsonValue], ...]
    tuned: tuple[tuple[str, JsonValue], ...]
    seed: int

    @property
    def is_tuning(self) -> bool:
        """Whether it is measured on the validation prompts, to choose a setting by."""
        return self.seed >= TUNING_SEED

    @property
    def key(self) -> str:
        """Its name in the results."""
        chosen = [f"{name}={value}" for name, value in last_parts(dict((*self.grid, *self.tuned))).items()]
        return "/".join([self.arm, self.regime, *chosen, f"seed={self.seed}"])


def read_arms(only: Iterable[str] = ()) -> dict[str, Arm]:
    """The arms by name, in the order of their files.

    Raises:
        ConfigError: there is no such arm, or a file is wrong.
    """
    names = sorted(path.stem for path in STUDY.glob("*.yaml"))
    return {name: build(Arm, read_yaml(str(STUDY / f"{name}.yaml"))) for name in (tuple(only) or names)}


def read_regime(name: str) -> dict[str, Any]:
    """A regime: its models; `run`, a run file; `sft`, how its student was fine-tuned.

    `validation` is laid over the held-out prompts for runs that choose a setting, `finetuning_prompts_seed`
    is that of the prompts of the student's fine-tuning, `seed_step` how far the prompts of two seeds lie
    apart, `texts` how many answers are kept to be read, `lowest` the figure that a setting is chosen by where
    that is not the highest accuracy.
    """
    return read_yaml(str(STUDY / "regimes" / f"{name}.yaml"))


def last_parts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the last part of their names."""
    return {name.rpartition(".")[2]: value for name, value in settings.items()}


def combinations(grid: Grid) -> Iterator[tuple[tuple[str, JsonValue], ...]]:
    """Every combination of a grid's values, in order; one empty one for an empty grid."""
    for values in product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


def settings_of(arm: Arm, cell: Cell) -> dict[str, Any]:
    """The run file of a cell, but for the models and the folders."""
    regime = read_regime(cell.regime)
    settings = merged(regime["run"], _method(arm.method))
    settings = merged(settings, arm.run)
    for name, value in (*cell.grid, *cell.tuned):
        settings = merged(settings, _nested(name, value))
    seeds = [
        f"prompts.seed={prompts_seed(regime, cell.seed)}",
        f"rollout.sampling.seed={cell.seed}",
        f"train.seed={cell.seed}",
    ]
    for one in seeds:
        settings = merged(settings, parse_set(one))
    return settings


def prompts_seed(regime: Mapping[str, Any], seed: int) -> int:
    """Seed of the prompts of a run: none draws those whose answers the student was fine-tuned on."""
    drawn = seed + TUNING_SEED + 1 if seed == regime.get("finetuning_prompts_seed") else seed
    return int(drawn * regime.get("seed_step", 1))


def _method(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    recipe = read_yaml(str(Path(RECIPES) / "methods" / f"{name}.yaml"))
    return {"train": {"objective": recipe["objective"]}}


def _nested(name: str, value: JsonValue) -> dict[str, Any]:
    for key in reversed(name.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value
