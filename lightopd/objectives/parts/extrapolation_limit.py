"""Limits of extrapolations: of the factor at near-deterministic tokens (arXiv 2605.08737; formula inferred),
and of the probability that a cut support leaves out.

R = rollouts, N = tokens; numpy.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightopd.cache.reader import ShardColumns
from lightopd.errors import CacheError
from lightopd.objectives.base.rollout_table import (
    Floats,
    Measure,
    RolloutTable,
    sums,
    teacher_logprobs,
)
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.targets import ConstantExtrapolation, DistanceExtrapolation


def critical_factor(teacher: ArrayLike, reference: ArrayLike, ratio_clip: float) -> Floats:
    """Factor at which a Bernoulli token's deviation becomes `ratio_clip` times rarer than under the teacher.

    lambda* = 1 + [logit(1 - (1 - p) / c) - logit p] / (logit p - logit b); infinite where b >= p. The paper's
    own closed form is not known; this is the fixed point logit x = lambda logit p + (1 - lambda) logit b with
    1 - x = (1 - p) / c, and gives the reported 1.22 at p = 0.9993, b = 0.5, c = 5.

    Args:
        teacher: p, probability of the likely token under the teacher, in (0, 1).
        reference: b, under the reference, in (0, 1).
        ratio_clip: c, above 1.
    """
    p, b = np.asarray(teacher, np.float64), np.asarray(reference, np.float64)
    room = _logit(1 - (1 - p) / ratio_clip) - _logit(p)
    distance = _logit(p) - _logit(b)
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(distance > 0, 1 + room / np.where(distance > 0, distance, 1), np.inf))


def _logit(p: Floats) -> Floats:
    return np.asarray(np.log(p) - np.log1p(-p))


def guard_measures(config: ConstantExtrapolation, term: TermConfig) -> dict[str, Measure]:
    """Near-deterministic tokens of each rollout, and those whose limit lies below the factor."""
    guard = config.guard
    if guard is None:
        return {}

    def near(view: ShardColumns) -> NDArray[np.bool_]:
        return np.asarray(np.exp(teacher_logprobs(term, view).astype(np.float64)) >= guard.min_probability)

    def unsafe(view: ShardColumns) -> NDArray[np.bool_]:
        p_N = np.exp(teacher_logprobs(term, view).astype(np.float64)).clip(1e-12, 1 - 1e-12)
        b_N = np.exp(view.signals[config.reference].logprobs_N.astype(np.float64)).clip(1e-12, 1 - 1e-12)
        return np.asarray(near(view) & (critical_factor(p_N, b_N, guard.ratio_clip) < config.factor))

    return {
        f"near {term.name}": lambda view: sums(view, near(view)),
        f"unsafe {term.name}": lambda view: sums(view, unsafe(view)),
    }


def check_guard(config: ConstantExtrapolation, term: TermConfig, table: RolloutTable) -> list[str]:
    """One line on the share of tokens past their limit.

    Raises:
        CacheError: the share is above the limit and the guard refuses.
    """
    guard = config.guard
    if guard is None:
        return []
    near, unsafe = table.measures[f"near {term.name}"].sum(), table.measures[f"unsafe {term.name}"].sum()
    share = float(unsafe / near) if near else 0.0
    line = (
        f"term {term.name}: factor {config.factor} lies above the inferred limit at {share:.2%} of "
        f"{int(near)} near-deterministic tokens"
    )
    if share > guard.max_share and guard.action == "refuse":
        raise CacheError(f"{line}, more than {guard.max_share:.2%}; lower the factor, or set action: warn")
    return [line]


def tail_measures(config: DistanceExtrapolation, term: TermConfig) -> dict[str, Measure]:
    """Mean probability outside the top-k of teacher and reference; nothing where no top-k was read."""

    def outside(signal: str) -> Measure:
        def measure(view: ShardColumns) -> Floats:
            tail_N = view.signals[signal].tail_logprobs_N
            return sums(
                view, np.zeros(len(view.loss_mask_N)) if tail_N is None else np.exp(tail_N.astype(np.float64))
            )

        return measure

    return {f"outside {name}": outside(name) for name in (term.signal, config.reference)}


def check_tail(config: DistanceExtrapolation, term: TermConfig, table: RolloutTable) -> list[str]:
    """Refuses supports that are cut too short: the gradient is off by .94 of its norm at 3 of 11 tokens.

    Raises:
        CacheError: the mean probability outside a top-k is above `max_tail`.
    """
    for name in (term.signal, config.reference):
        outside = float(table.measures[f"outside {name}"].sum() / max(table.lengths_R.sum(), 1))
        if outside > config.max_tail:
            raise CacheError(
                f"signal {name} leaves {outside:.3f} of the probability outside its top-k, more than "
                f"{config.max_tail:g}: the extrapolation by distance would be another one; score it with a "
                f"larger --top-k, or set extrapolate.max_tail"
            )
    return []
