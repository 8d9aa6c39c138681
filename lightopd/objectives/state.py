"""What an objective remembers between optimiser steps: a curriculum's rung, running means of losses.

N = response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.objectives.exposure import Exposure, is_choice_due, level_of, next_exposure
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.objectives.weights import EmaBalance, LengthCurriculum, TurnCurriculum


@dataclass(frozen=True, slots=True)
class ObjectiveState:
    """Goes into checkpoints as a plain mapping (`dataclasses.asdict`)."""

    steps: int = 0
    """Optimiser steps done."""
    rung: int = 0
    """Place on the ladder of lengths."""
    rung_since: int = 0
    """Step at which the rung was reached."""
    averages: dict[str, float] = field(default_factory=dict)
    """Running mean of each balanced term's loss, begun at zero."""
    exposure: Exposure | None = None
    """What is known of the signals of an exposure; None before the first choice."""


def advance(config: ObjectiveConfig, state: ObjectiveState, metrics: Mapping[str, float]) -> ObjectiveState:
    """The state after an optimiser step.

    Args:
        config: the objective.
        state: before the step.
        metrics: reduced over the whole step: `entropy` (mean token entropy of the student, nats, on the
            tokens that a length curriculum reads; NaN where it reads none), `TERM/loss` of each term, and
            `held_out` (the loss held out, after a step at which `reads_held_out`).
    """
    steps = state.steps + 1
    rung, since = state.rung, state.rung_since
    if isinstance(config.curriculum, LengthCurriculum):
        rung = next_rung(config.curriculum, rung, steps - since, metrics["entropy"])
        since = steps if rung != state.rung else since
    averages = _averaged(config.balance, state.averages, metrics) if config.balance else {}
    exposure = state.exposure
    if config.exposure is not None and is_choice_due(config.exposure, steps):
        exposure = next_exposure(config.exposure, exposure, steps, metrics["held_out"])
    return ObjectiveState(steps, rung, since, averages, exposure)


def restored(saved: Mapping[str, Any]) -> ObjectiveState:
    """The state that `dataclasses.asdict` has written."""
    exposure = saved.get("exposure")
    return ObjectiveState(**{**saved, "exposure": None if exposure is None else Exposure(**exposure)})


def exposure_metric(config: ObjectiveConfig, state: ObjectiveState) -> dict[str, float]:
    """Metric `exposure`: number of the signal that taught the step after `state`."""
    return {} if config.exposure is None else {"exposure": level_of(config.exposure, state.exposure)}


def reads_held_out(config: ObjectiveConfig, state: ObjectiveState) -> bool:
    """Whether the step after `state` ends with a choice of exposure, which needs the loss held out."""
    return config.exposure is not None and is_choice_due(config.exposure, state.steps + 1)


def reads_entropy(config: ObjectiveConfig, state: ObjectiveState) -> bool:
    """Whether the step after `state` is one at which a length curriculum considers its next rung."""
    if not isinstance(config.curriculum, LengthCurriculum) or state.rung + 1 == len(
        config.curriculum.lengths
    ):
        return False
    return (state.steps + 1 - state.rung_since) % config.curriculum.every == 0


def next_rung(config: LengthCurriculum, rung: int, steps_on_rung: int, entropy: float) -> int:
    """One rung up when it was held long enough and the student is still uncertain; never down."""
    is_due = steps_on_rung >= config.every and entropy >= config.min_entropy
    return min(rung + 1, len(config.lengths) - 1) if is_due else rung


def visible_tokens(
    config: ObjectiveConfig,
    state: ObjectiveState,
    index_N: NDArray[np.int64],
    turns_N: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which response tokens the curriculum trains on now, bool [N]; combine with the loss mask.

    Apply it before `lengths_R` and `BatchTotals` are counted. What it leaves is a prefix of every response.

    Args:
        config: the objective.
        state: before the step.
        index_N: position of a token within its response, from 0.
        turns_N: assistant turn of a token, from 0.
    """
    curriculum = config.curriculum
    if isinstance(curriculum, TurnCurriculum):
        return np.asarray(turns_N < visible_turns(curriculum, state.steps))
    if isinstance(curriculum, LengthCurriculum):
        return np.asarray(index_N < curriculum.lengths[state.rung])
    return np.ones(len(index_N), bool)


def visible_turns(config: TurnCurriculum, steps_done: int) -> int:
    """min(start + floor(steps / every), limit) (arXiv 2604.24005)."""
    turns = config.start + steps_done // config.every
    return turns if config.limit is None else min(turns, config.limit)


def term_factor(config: ObjectiveConfig, state: ObjectiveState | None, name: str) -> float:
    """Factor of a term: mean loss of the anchor over mean loss of the follower, else 1 (arXiv 2606.00147).

    The means end with the step before, so that a step needs one pass; at the first step the factor is 1.
    """
    balance = config.balance
    if balance is None or state is None or name != balance.follower or not state.averages:
        return 1.0
    # The paper corrects both means for their start by one and the same number, which cancels here.
    return state.averages[balance.anchor] / (state.averages[balance.follower] + balance.epsilon)


def _averaged(
    config: EmaBalance, averages: Mapping[str, float], metrics: Mapping[str, float]
) -> dict[str, float]:
    return {
        name: config.decay * averages.get(name, 0.0) + (1 - config.decay) * metrics[f"{name}/loss"]
        for name in (config.anchor, config.follower)
    }
