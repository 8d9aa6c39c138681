"""The cache as `prepare` sees it: sampled-token columns of a shard, summarised to one row per rollout.

R = rollouts, N = their response tokens laid end to end; numpy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns
from lightopd.errors import CacheError
from lightopd.objectives.base.part import Needs
from lightopd.schemas.objectives.objective import TermConfig

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RolloutTable:
    """One row per rollout."""

    rollout_ids: NDArray[np.str_]
    groups_R: NDArray[np.int64]
    rewards_R: NDArray[np.float32]
    origins_R: NDArray[np.str_]
    teacher_rewards_R: NDArray[np.float32]
    lengths_R: NDArray[np.int64]
    """Trained tokens."""
    is_correct_R: NDArray[np.bool_]
    """Reward at or above `correct_at`; False where there is none."""
    is_incorrect_R: NDArray[np.bool_]
    """Reward below `correct_at`; False where there is none."""
    measures: dict[str, Floats]
    """What the parts asked for, [R] each."""


Measure = Callable[[ShardColumns], Floats]


def summarise(
    view: ShardColumns, measures: Mapping[str, Measure], correct_at: float, wanted: Needs
) -> RolloutTable:
    """One row per rollout of a shard.

    Raises:
        CacheError: a log-probability or a reward is not finite; the message names signal, rollout and token.
    """
    _check_finite(view, wanted)
    rewards_R = np.asarray(view.rewards_R, np.float32)
    missing = np.full(len(view.rollout_ids), np.nan, np.float32)
    with np.errstate(invalid="ignore"):
        is_correct_R, is_incorrect_R = rewards_R >= correct_at, rewards_R < correct_at
    return RolloutTable(
        np.asarray(view.rollout_ids, np.str_),
        np.asarray(view.groups_R, np.int64),
        rewards_R,
        np.asarray(view.origins, np.str_),
        missing if view.teacher_rewards_R is None else np.asarray(view.teacher_rewards_R, np.float32),
        sums(view, view.loss_mask_N).astype(np.int64),
        is_correct_R,
        is_incorrect_R,
        {name: measure(view) for name, measure in measures.items()},
    )


def concatenate(tables: Sequence[RolloutTable]) -> RolloutTable:
    """The tables one after another.

    Raises:
        CacheError: there is no rollout at all.
    """
    if not sum(len(table.rollout_ids) for table in tables):
        raise CacheError("the cache has no rollouts")
    joined: dict[str, Any] = {
        column.name: np.concatenate([getattr(table, column.name) for table in tables])
        for column in fields(RolloutTable)
        if column.name != "measures"
    }
    names = tables[0].measures
    measures = {name: np.concatenate([table.measures[name] for table in tables]) for name in names}
    return RolloutTable(measures=measures, **joined)


def subset(table: RolloutTable, keep_R: NDArray[np.bool_]) -> RolloutTable:
    """The rows where `keep_R` is True."""
    kept: dict[str, Any] = {
        column.name: getattr(table, column.name)[keep_R]
        for column in fields(RolloutTable)
        if column.name != "measures"
    }
    measures = {name: values_R[keep_R] for name, values_R in table.measures.items()}
    return replace(table, measures=measures, **kept)


def sums(view: ShardColumns, values_N: NDArray[Any]) -> Floats:
    """Sum over the trained tokens of each rollout, float64 [R]."""
    counted_N = np.where(view.loss_mask_N, values_N, 0).astype(np.float64)
    return np.diff(np.concatenate([[0.0], np.cumsum(counted_N)])[view.offsets])


def means(view: ShardColumns, values_N: NDArray[Any]) -> Floats:
    """Mean over the trained tokens of each rollout, float64 [R]; 0 where there are none."""
    return sums(view, values_N) / np.maximum(sums(view, view.loss_mask_N), 1)


def mean_ref_logprob(view: ShardColumns) -> Floats:
    """Mean log-probability of a rollout under the student that sampled it, [R]."""
    assert view.logprobs_N is not None, "a part does not declare the column ref_logprobs"
    return means(view, view.logprobs_N)


def teacher_logprobs(term: TermConfig, view: ShardColumns) -> NDArray[np.float32]:
    """Log-probabilities of the sampled tokens under the term's teacher, routed by domain, [N]."""
    logprobs_N = view.signals[term.signal].logprobs_N
    if term.router is None:
        return logprobs_N
    domains_N = np.repeat(np.asarray([domain or "" for domain in view.domains]), np.diff(view.offsets))
    for domain, signal in term.router.signals.items():
        logprobs_N = np.where(domains_N == domain, view.signals[signal].logprobs_N, logprobs_N)
    return logprobs_N


def group_numbers(table: RolloutTable) -> NDArray[np.int64]:
    """Groups numbered from 0, [R]."""
    return np.unique(table.groups_R, return_inverse=True)[1].astype(np.int64)


def _check_finite(view: ShardColumns, wanted: Needs) -> None:
    columns: dict[str, NDArray[np.float32] | None] = {
        f"signal {name}": view.signals[name].logprobs_N if name in view.signals else None
        for name in wanted.signals
    }
    if "ref_logprobs" in wanted.columns:
        columns["rollout-time log-probabilities"] = view.logprobs_N
    for name, values_N in columns.items():
        if values_N is None:
            raise CacheError(f"{name} is missing in the cache, and this objective reads it")
        is_bad_N = ~np.isfinite(values_N)
        if is_bad_N.any():
            place = int(np.flatnonzero(is_bad_N)[0])
            row = int(np.searchsorted(view.offsets, place, side="right")) - 1
            raise CacheError(
                f"{name}: {int(is_bad_N.sum())} values are not finite, the first is {values_N[place]} at "
                f"token {place - int(view.offsets[row])} of rollout {view.rollout_ids[row]}; score this "
                f"cache again"
            )
