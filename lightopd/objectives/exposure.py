"""Which of several signals teaches, by how much the held-out loss fell under each: a gradient bandit.

L = signals, by rising exposure.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig
from lightopd.schemas.objectives.weights import TeacherExposure

Floats = NDArray[np.float64]

SPREAD = 1e-8
"""Added to the rewards' deviation, nats: a smaller one is rounding."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """What is known of the signals after a choice."""

    level: int
    """The signal that teaches now."""
    preferences: list[float]
    """[L], their softmax is the policy."""
    loss: float
    """Held-out loss at the choice, nats."""
    rewards: list[float]
    """Of every choice so far: by how much the loss fell, at least 0."""


def level_of(config: TeacherExposure, exposure: Exposure | None) -> int:
    """The signal that teaches now: the middle one before the first choice."""
    return len(config.signals) // 2 if exposure is None else exposure.level


def exposed(config: ObjectiveConfig, exposure: Exposure | None) -> ObjectiveConfig:
    """The objective with the chosen signal in the place of each term's that is exposed."""
    if config.exposure is None:
        return config
    chosen = config.exposure.signals[level_of(config.exposure, exposure)]
    return at_signal(config, config.exposure, chosen)


def at_signal(config: ObjectiveConfig, exposure: TeacherExposure, signal: str) -> ObjectiveConfig:
    """The objective under one of the signals."""

    def term_under(term: TermConfig) -> TermConfig:
        is_exposed = term.signal in exposure.signals
        return term.model_copy(update={"signal": signal}) if is_exposed else term

    return config.model_copy(update={"terms": tuple(map(term_under, config.terms))})


def is_choice_due(config: TeacherExposure, steps_done: int) -> bool:
    """Whether the signal may change after so many steps."""
    return steps_done % config.hold == 0


def policy(config: TeacherExposure, preferences: Floats) -> Floats:
    """Probability of each signal, [L]: softmax of the preferences, mixed with an even draw."""
    weights_L = np.exp(preferences - preferences.max())
    even = config.explore / len(preferences)
    return np.asarray((1 - config.explore) * weights_L / weights_L.sum() + even)


def next_exposure(
    config: TeacherExposure, exposure: Exposure | None, steps_done: int, loss: float
) -> Exposure:
    """Learns from the window that ended and draws the signal of the next.

    The reward is max(0, loss before - loss now), normalised by those seen so far: A = (r - mean) / std, and
    preferences move by rate * A * (chosen - policy), REINFORCE's gradient with a baseline (arXiv 2605.11458).
    The first window has no loss before it, so it teaches nothing.
    """
    preferences_L = np.zeros(len(config.signals)) if exposure is None else np.array(exposure.preferences)
    rewards = [] if exposure is None else [*exposure.rewards, max(0.0, exposure.loss - loss)]
    if exposure is not None:
        advantage = (rewards[-1] - np.mean(rewards)) / (np.std(rewards) + SPREAD)
        chosen_L = np.eye(len(preferences_L))[exposure.level]
        preferences_L = preferences_L + config.rate * advantage * (chosen_L - policy(config, preferences_L))
    stream = np.random.Generator(np.random.Philox(key=[config.seed % 2**64, steps_done]))
    reached_L = np.cumsum(policy(config, preferences_L))
    level = int(np.searchsorted(reached_L[:-1], stream.random(), side="right"))
    return Exposure(level, preferences_L.tolist(), loss, rewards)
