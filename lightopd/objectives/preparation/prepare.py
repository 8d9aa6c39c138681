"""What an objective takes from the whole cache, once, before the first step.

Group means, balances and normalisers must not depend on how rollouts fall into batches, so they are computed
here, from cached columns alone, as one number per rollout: which rollouts are kept, and named columns that
travel with them (`RolloutBatch.prepared_R`). R = rollouts, N = their response tokens laid end to end; numpy.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns
from lightopd.errors import CacheError
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.rollout_table import (
    RolloutTable,
    concatenate,
    subset,
    summarise,
)
from lightopd.objectives.parts.registry import PARTS
from lightopd.objectives.requirements import needs, parts_of
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig


@dataclass(frozen=True, slots=True)
class PreparedRollouts:
    """One entry per rollout of the cache, in the order of the views."""

    keep_R: NDArray[np.bool_]
    """Rollouts that are trained on at all; plan batches over these only."""
    columns: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By `TERM/NAME`, [R] or [R, ...]; gather into `RolloutBatch.prepared_R`."""
    notes: tuple[str, ...] = ()
    """Lines for the stage's report: what was dropped, and warnings."""


def prepare_rollouts(config: ObjectiveConfig, views: Iterable[ShardColumns]) -> PreparedRollouts:
    """Selects rollouts and makes the columns that the objective reads from the whole cache.

    Args:
        config: the objective.
        views: the whole cache, in one piece or shard by shard; only one is held at a time.

    Raises:
        CacheError: a value is not finite, all rewards are missing, a group of one where a group is needed,
            weights that sum to zero, or a selection that keeps nothing.
    """
    wanted = needs(config)
    measures = _measures(config)
    table = concatenate([summarise(view, measures, config.correct_at, wanted) for view in views])
    _check_rewards(wanted, table)
    keep_R, notes = _select(config, table)
    kept = subset(table, keep_R)
    notes += _check_groups(wanted, kept)
    columns: dict[str, NDArray[np.float32]] = {}
    for term in config.terms:
        notes += _checks(term, kept)
        for name, column_R in _columns(term, kept).items():
            columns[f"{term.name}/{name}"] = np.zeros((len(keep_R), *column_R.shape[1:]), np.float32)
            columns[f"{term.name}/{name}"][keep_R] = column_R
    return PreparedRollouts(keep_R, columns, tuple(notes))


def _measures(config: ObjectiveConfig) -> dict[str, Callable[[ShardColumns], NDArray[np.float64]]]:
    measures: dict[str, Callable[[ShardColumns], NDArray[np.float64]]] = {}
    for selection in config.select:
        of = PARTS[type(selection)].measures
        measures |= of(selection, None) if of else {}
    for term in config.terms:
        for part in parts_of(term):
            of = PARTS[type(part)].measures
            measures |= of(part, term) if of else {}
    return measures


def _select(config: ObjectiveConfig, table: RolloutTable) -> tuple[NDArray[np.bool_], list[str]]:
    keep_R, notes = np.ones(len(table.rollout_ids), bool), []
    for selection in config.select:
        function = PARTS[type(selection)].function
        assert function is not None
        kept = function(selection, subset(table, keep_R))
        dropped = int((~kept).sum())
        keep_R[keep_R] = kept
        notes.append(f"selection {selection.kind} dropped {dropped} rollouts, {int(keep_R.sum())} are left")
        if not keep_R.any():
            raise CacheError(f"selection {selection.kind} keeps none of the cache's {len(keep_R)} rollouts")
    return keep_R, notes


def _columns(term: TermConfig, table: RolloutTable) -> dict[str, NDArray[np.float64]]:
    is_seen_R = _seen(term, table)
    columns: dict[str, NDArray[np.float64]] = {}
    weight_R = is_seen_R.astype(np.float64)
    for part in parts_of(term):
        column = PARTS[type(part)].column
        if column is None:
            continue
        values_R = column(part, term, table, is_seen_R)
        if part in term.rollout_weights:
            weight_R = weight_R * values_R
        else:
            columns[_COLUMN_NAMES.get(part.kind, part.kind)] = values_R
    if not weight_R.sum() > 0:
        raise CacheError(
            f"term {term.name}: rollout weights sum to zero over the cache ({int(is_seen_R.sum())} of "
            f"{len(is_seen_R)} rollouts match rows: {term.rows}); nothing would be trained"
        )
    if term.average_over == "rows":
        size_R = table.lengths_R if term.reduce == "token_mean" else table.lengths_R > 0
        weight_R = weight_R * (size_R.sum() / size_R[is_seen_R].sum())
    return {**columns, "weight": weight_R} if has_weight(term) else columns


_COLUMN_NAMES = {"preference": "preferred", "unpaired": "outcome"}


def has_weight(term: TermConfig) -> bool:
    """Whether `prepare` makes the column `weight` for this term."""
    cached = any(PARTS[type(part)].column is not None for part in term.rollout_weights)
    return cached or term.rows != "all" or term.average_over == "rows"


def _seen(term: TermConfig, table: RolloutTable) -> NDArray[np.bool_]:
    """Rollouts of the term that have a trained token; others have no mean log-probability to compare."""
    has_tokens_R = table.lengths_R > 0
    if term.rows == "all":
        return has_tokens_R
    if term.rows in ("student", "teacher"):
        return np.asarray(table.origins_R == term.rows) & has_tokens_R
    return (table.is_correct_R if term.rows == "correct" else table.is_incorrect_R) & has_tokens_R


def _checks(term: TermConfig, table: RolloutTable) -> list[str]:
    notes: list[str] = []
    for part in parts_of(term):
        check = PARTS[type(part)].check
        notes += check(part, term, table) if check else []
    return notes


def _check_rewards(wanted: Needs, table: RolloutTable) -> None:
    if "reward" in wanted.columns and not np.isfinite(table.rewards_R).any():
        raise CacheError(
            "all rewards are missing, and this objective reads them; give the prompts an `answer` and sample "
            "again, or choose an objective without rewards (see `lightopd methods`)"
        )


def _check_groups(wanted: Needs, table: RolloutTable) -> list[str]:
    if not wanted.groups:
        return []
    _, counts = np.unique(table.groups_R, return_counts=True)
    lonely = int((counts < 2).sum())
    if lonely == len(counts):
        raise CacheError(
            f"each of the {lonely} prompts has a single rollout, and this objective compares rollouts of one "
            f"prompt; sample again with n of 2 or more"
        )
    return [f"{lonely} of {len(counts)} prompts have a single rollout and nothing to compare"] * bool(lonely)
