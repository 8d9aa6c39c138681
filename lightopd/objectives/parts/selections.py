"""Which rollouts are trained on, decided once from the whole cache: table -> bool per rollout.

R = rollouts; numpy. Nothing depends on the order of the rollouts.
"""

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from lightopd.errors import CacheError
from lightopd.objectives.base.rollout_table import (
    Floats,
    Measure,
    RolloutTable,
    group_numbers,
    mean_ref_logprob,
    means,
)
from lightopd.objectives.parts.columns import Bools, pass_rates
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.weights import (
    MarginSelection,
    OutcomeBalanceSelection,
    PassRateSelection,
    TeacherValidatedSelection,
)


def select_margin(config: MarginSelection, table: RolloutTable) -> Bools:
    """Greedy mask: drops from each prompt until correct outscore incorrect rollouts by delta.

    At each turn the rollout goes whose removal opens the gap most: the lowest correct or the highest
    incorrect one. Of each outcome max(1, floor(min_kept n)) of its n rollouts stay. Groups with one outcome
    stay whole. Source: arXiv 2605.03677 (order of the removals inferred).
    """
    score_R = table.measures[f"mean {config.signal}"] - table.measures["mean ref"]
    keep_R, group_R = np.ones(len(score_R), bool), group_numbers(table)
    by_group = np.argsort(group_R, kind="stable")
    for members in np.split(by_group, np.cumsum(np.bincount(group_R))[:-1]):
        members = members[table.lengths_R[members] > 0]
        correct = sorted(members[table.is_correct_R[members]], key=lambda row: score_R[row])
        incorrect = sorted(members[table.is_incorrect_R[members]], key=lambda row: -score_R[row])
        if correct and incorrect:
            keep_R[_dropped(config, score_R, correct, incorrect)] = False
    return keep_R


def _dropped(config: MarginSelection, score_R: Floats, correct: list[int], incorrect: list[int]) -> list[int]:
    dropped: list[int] = []
    least = [max(1, int(config.min_kept * len(outcome))) for outcome in (correct, incorrect)]
    while True:
        means = score_R[correct].mean(), score_R[incorrect].mean()
        if means[0] - means[1] >= config.delta:
            break
        gains = [
            (score_R[correct[1:]].mean() - means[0]) if len(correct) > least[0] else 0.0,
            (means[1] - score_R[incorrect[1:]].mean()) if len(incorrect) > least[1] else 0.0,
        ]
        if max(gains) <= 0:
            break
        dropped.append((correct if gains[0] >= gains[1] else incorrect).pop(0))
    return dropped


def margin_selection_measures(config: MarginSelection, term: TermConfig | None) -> dict[str, Measure]:
    """Mean log T and mean log s at rollout."""
    return {
        "mean ref": mean_ref_logprob,
        f"mean {config.signal}": lambda view: means(view, view.signals[config.signal].logprobs_N),
    }


def select_balance(config: OutcomeBalanceSelection, table: RolloutTable) -> Bools:
    """As many correct as incorrect rollouts; those without a reward stay (arXiv 2605.03677).

    Raises:
        CacheError: one outcome does not occur.
    """
    correct_R, incorrect_R = table.is_correct_R, table.is_incorrect_R
    if not correct_R.any() or not incorrect_R.any():
        raise CacheError(
            f"balancing outcomes needs both: {int(correct_R.sum())} rollouts are correct and "
            f"{int(incorrect_R.sum())} are not; sample harder or easier prompts, or leave the balance out"
        )
    more_R = correct_R if correct_R.sum() > incorrect_R.sum() else incorrect_R
    rows = np.flatnonzero(more_R)
    order = sorted(rows, key=lambda row: sha256(str(table.rollout_ids[row]).encode()).hexdigest())
    keep_R = np.ones(len(more_R), bool)
    keep_R[order[int(min(correct_R.sum(), incorrect_R.sum())) :]] = False
    return keep_R


def select_pass_rate(config: PassRateSelection, table: RolloutTable) -> Bools:
    """Prompts whose pass rate lies strictly between the bounds; those without a reward go."""
    rate_R = pass_rates(table)
    with np.errstate(invalid="ignore"):
        return np.asarray((rate_R > config.above) & (rate_R < config.below))


def select_teacher_validated(config: TeacherValidatedSelection, table: RolloutTable) -> Bools:
    """Prompts that the teacher solves, chosen by its lead over the student (arXiv 2602.02994, eqs. 13-22).

    Raises:
        CacheError: no prompt has a teacher's score.
    """
    group_R = group_numbers(table)
    first_G = np.unique(group_R, return_index=True)[1]
    teacher_G = table.teacher_rewards_R[first_G].astype(np.float64)
    if not np.isfinite(teacher_G).any():
        raise CacheError(
            f"no prompt of this cache has a graded answer of the teacher in {config.answers}; make one there "
            f"with `lightopd rollout` and the teacher as student, over the same prompts"
        )
    judged_G = np.bincount(group_R, np.isfinite(table.rewards_R))
    total_G = np.bincount(group_R, np.nan_to_num(table.rewards_R.astype(np.float64)))
    with np.errstate(invalid="ignore", divide="ignore"):
        lead_G = teacher_G - total_G / judged_G
        valid = np.flatnonzero((teacher_G >= config.min_teacher) & np.isfinite(lead_G))
    by_id = np.argsort(table.rollout_ids, kind="stable")
    rank_G = np.unique(group_R[by_id], return_index=True)[1]  # place of a group's lowest rollout id
    valid = valid[np.argsort(rank_G[valid], kind="stable")]
    chosen = valid[choose_by_lead(config, lead_G[valid])] if len(valid) else valid
    return np.isin(group_R, chosen)


def choose_by_lead(config: TeacherValidatedSelection, lead_P: Floats) -> NDArray[np.int64]:
    """Places of the chosen prompts, by the sampler's rule; all when there are no more than wanted.

    Args:
        config: sampler and number of prompts.
        lead_P: teacher's score minus student's of each validated prompt, in an order that content decides.
    """
    order = np.argsort(-lead_P, kind="stable").astype(np.int64)
    if len(order) <= config.prompts:
        return order
    if config.sampler == "top":
        return order[: config.prompts]
    if config.sampler == "stride":
        return order[np.linspace(0, len(order) - 1, config.prompts).round().astype(np.int64)]
    random = np.random.default_rng(config.seed)
    if config.sampler == "gaussian":
        weight_P = gaussian_weights(config, lead_P)
        return random.choice(len(lead_P), config.prompts, replace=False, p=weight_P).astype(np.int64)
    return _from_buckets(config, lead_P, random)


def gaussian_weights(config: TeacherValidatedSelection, lead_P: Floats) -> Floats:
    """exp(-(lead - centre)^2 / (2 width^2)), summing to one."""
    exponent_P = -((lead_P - config.centre) ** 2) / (2 * config.width**2)
    weight_P = np.exp(exponent_P - exponent_P.max()) + 1e-12
    return np.asarray(weight_P / weight_P.sum())


def _from_buckets(
    config: TeacherValidatedSelection, lead_P: Floats, random: np.random.Generator
) -> NDArray[np.int64]:
    """Equally many from buckets of equal width, in turns, until the number is reached."""
    edges = np.linspace(lead_P.min(), lead_P.max(), config.buckets + 1)[1:-1]
    bucket_P = np.digitize(lead_P, edges)
    queues = [
        list(random.permutation(np.flatnonzero(bucket_P == bucket))) for bucket in range(config.buckets)
    ]
    chosen: list[int] = []
    while len(chosen) < config.prompts:
        for queue in queues:
            if queue and len(chosen) < config.prompts:
                chosen.append(int(queue.pop()))
    return np.asarray(chosen, np.int64)
