"""Columns that `prepare` makes from the whole cache: rewards, margins, weights of rollouts.

R = rollouts, N = their response tokens laid end to end, G = groups; numpy float64, one value per rollout.
`is_seen_R` marks the rollouts that the term sees; values elsewhere are not used.
"""

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns
from lightopd.errors import CacheError
from lightopd.objectives.base.rollout_table import (
    Floats,
    Measure,
    RolloutTable,
    group_numbers,
    mean_ref_logprob,
    means,
    teacher_logprobs,
)
from lightopd.schemas.objectives.advantages import (
    GroupRewardShift,
    MarginShift,
)
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.targets import (
    PreferenceTarget,
    RewardTarget,
    UnpairedTarget,
)
from lightopd.schemas.objectives.weights import (
    ConfidenceWeight,
    ContrastWeight,
    DifficultyWeight,
    PerplexityWeight,
)

Bools = NDArray[np.bool_]


def group_reward(
    config: RewardTarget | GroupRewardShift, term: TermConfig, table: RolloutTable, is_seen_R: Bools
) -> Floats:
    """(reward - group mean) / (group standard deviation + epsilon); 0 without a reward or in a group of one.

    The deviation is the unbiased one, as in verl, on which the code of arXiv 2605.07725 is built.
    """
    return _standardised(table.rewards_R.astype(np.float64), table, ddof=1, epsilon=config.epsilon)


def _standardised(values_R: Floats, table: RolloutTable, ddof: int, epsilon: float) -> Floats:
    """Standardised within each group over its finite values; 0 for the others and for groups of one."""
    group_R, is_there_R = group_numbers(table), np.isfinite(values_R)
    known_R = np.where(is_there_R, values_R, 0.0)
    count_G = np.bincount(group_R, is_there_R)
    mean_R = (np.bincount(group_R, known_R) / np.maximum(count_G, 1))[group_R]
    centred_R = np.where(is_there_R, known_R - mean_R, 0.0)
    variance_G = np.bincount(group_R, centred_R**2) / np.maximum(count_G - ddof, 1)
    return centred_R / (np.sqrt(variance_G)[group_R] + epsilon)


def margin(config: MarginShift, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """Shift that opens a gap of delta between correct and incorrect rollouts (arXiv 2605.03677)."""
    score_R = _margin_scores(term, table)
    group_R = group_numbers(table) if config.scope == "group" else np.zeros(len(score_R), np.int64)
    correct_R, incorrect_R = table.is_correct_R & is_seen_R, table.is_incorrect_R & is_seen_R
    gap_G = outcome_gap(score_R, group_R, correct_R, incorrect_R, config.gap)
    missing_R = np.nan_to_num(np.maximum(0.0, config.delta - gap_G))[group_R]
    up, down = {"both": (0.5, 0.5), "correct_up": (1.0, 0.0), "incorrect_down": (0.0, 1.0)}[config.direction]
    return np.asarray(missing_R * (up * correct_R - down * incorrect_R))


def outcome_gap(
    score_R: Floats, group_R: NDArray[np.int64], correct_R: Bools, incorrect_R: Bools, gap: str
) -> Floats:
    """Score of correct minus score of incorrect rollouts of each group; NaN where an outcome is missing."""
    groups = int(group_R.max()) + 1
    if gap == "min_max":
        lowest_G, highest_G = np.full(groups, np.inf), np.full(groups, -np.inf)
        np.minimum.at(lowest_G, group_R[correct_R], score_R[correct_R])
        np.maximum.at(highest_G, group_R[incorrect_R], score_R[incorrect_R])
        has_both_G = np.isfinite(lowest_G) & np.isfinite(highest_G)
        return np.where(has_both_G, lowest_G - highest_G, np.nan)
    with np.errstate(invalid="ignore"):
        means = [
            np.bincount(group_R, score_R * is_one_R, groups) / np.bincount(group_R, is_one_R, groups)
            for is_one_R in (correct_R, incorrect_R)
        ]
    return np.asarray(means[0] - means[1])


def margin_measures(config: object, term: TermConfig) -> dict[str, Measure]:
    """Mean log T and mean log s at rollout."""
    return {"mean ref": mean_ref_logprob, f"mean {term.name}": _teacher_mean(term)}


def _margin_scores(term: TermConfig, table: RolloutTable) -> Floats:
    return table.measures[f"mean {term.name}"] - table.measures["mean ref"]


def _teacher_mean(term: TermConfig) -> Measure:
    return lambda view: means(view, teacher_logprobs(term, view))


def perplexity(config: PerplexityWeight, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """PPL^(+-1/tau) over its mean in the group, among the rollouts the term sees (arXiv 2604.10688)."""
    name = "mean ref" if config.of == "student" else f"mean {term.name}"
    sign = 1.0 if config.favour == "high" else -1.0
    exponent_R = np.where(is_seen_R, -sign * table.measures[name] / config.tau, -np.inf)
    group_R = group_numbers(table)
    peak_G = np.full(int(group_R.max()) + 1, np.finfo(np.float64).min)
    np.maximum.at(peak_G, group_R, exponent_R)
    raw_R = np.exp(exponent_R - peak_G[group_R])
    mean_G = np.bincount(group_R, raw_R) / np.maximum(np.bincount(group_R, is_seen_R), 1)
    return raw_R / np.where(mean_G > 0, mean_G, 1.0)[group_R]


def perplexity_measures(config: PerplexityWeight, term: TermConfig) -> dict[str, Measure]:
    """Mean log-probability under the student at rollout, or the teacher."""
    if config.of == "student":
        return {"mean ref": mean_ref_logprob}
    return {f"mean {term.name}": _teacher_mean(term)}


def contrast(config: ContrastWeight, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """clip(1 + alpha a, low, high), a standardised in the group by the population deviation (2606.25319)."""
    gain_R = table.measures[f"gain {term.name}"] - config.gamma * table.measures[f"loss {term.name}"]
    score_R = _standardised(np.where(is_seen_R, gain_R, np.nan), table, ddof=0, epsilon=1e-6)
    return np.clip(1 + config.alpha * score_R, config.low, config.high)


def contrast_measures(config: ContrastWeight, term: TermConfig) -> dict[str, Measure]:
    """Mean of the positive and of the negative part of log T with the evidence minus log T without."""

    def part(sign: float) -> Measure:
        def measure(view: ShardColumns) -> Floats:
            gap_N = teacher_logprobs(term, view) - view.signals[config.negative].logprobs_N
            return means(view, np.maximum(sign * gap_N, 0))

        return measure

    return {f"gain {term.name}": part(1.0), f"loss {term.name}": part(-1.0)}


def confidence(config: ConfidenceWeight, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """softmax over the teachers of confidence / (100 tau), this term's share (2605.01347).

    Raises:
        CacheError: a teacher stated no confidence in a rollout that the term sees.
    """
    names = (config.text, *config.others)
    stated_CR = np.stack([table.measures[f"text {name}"] for name in names])
    is_missing_CR = ~np.isfinite(stated_CR) & is_seen_R
    if is_missing_CR.any():
        place, row = (int(each[0]) for each in np.nonzero(is_missing_CR))
        raise CacheError(
            f"text {names[place]} has no number for {int(is_missing_CR[place].sum())} rollouts, the first is "
            f"{table.rollout_ids[row]}; write it anew under another name, with a `value` that finds one"
        )
    scaled_CR = np.where(np.isfinite(stated_CR), stated_CR, 0.0) / (100 * config.tau)
    share_CR = np.exp(scaled_CR - scaled_CR.max(0))
    return np.asarray(share_CR[0] / share_CR.sum(0))


def confidence_measures(config: ConfidenceWeight, term: TermConfig) -> dict[str, Measure]:
    """The numbers of every teacher's text."""

    def number(name: str) -> Measure:
        return lambda view: np.asarray(view.text_values_R[name], np.float64)

    return {f"text {name}": number(name) for name in (config.text, *config.others)}


def difficulty(config: DifficultyWeight, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """`factor` for prompts of medium pass rate, 1 for others, over the mean of the seen rollouts."""
    rate_R = pass_rates(table)
    with np.errstate(invalid="ignore"):
        is_medium_R = (rate_R >= config.low) & (rate_R <= config.high)
    weight_R = np.where(is_medium_R, config.factor, 1.0)
    return weight_R / weight_R[is_seen_R].mean() if is_seen_R.any() else weight_R


def pass_rates(table: RolloutTable) -> Floats:
    """Share of correct rollouts of each rollout's prompt; NaN where none has a reward."""
    group_R = group_numbers(table)
    judged_G = np.bincount(group_R, table.is_correct_R | table.is_incorrect_R)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.bincount(group_R, table.is_correct_R) / judged_G)[group_R]


def preferred(config: PreferenceTarget, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """1 for the teacher's answer and -1 for the student's.

    Raises:
        CacheError: a prompt does not have exactly one rollout of each.
    """
    group_R, is_teacher_R = group_numbers(table), table.origins_R == "teacher"
    teachers_G, all_G = np.bincount(group_R, is_teacher_R), np.bincount(group_R)
    is_odd_G = (teachers_G != 1) | (all_G != 2)
    if is_odd_G.any():
        raise CacheError(
            f"{int(is_odd_G.sum())} of {len(all_G)} prompts are no pair of one answer by the teacher and one "
            f"by the student; make the cache with lightopd join --pairs"
        )
    return np.where(is_teacher_R, 1.0, -1.0)


def outcome(config: UnpairedTarget, term: TermConfig, table: RolloutTable, is_seen_R: Bools) -> Floats:
    """1 for a right rollout, -1 for a wrong one, 0 without a reward.

    Raises:
        CacheError: one outcome does not occur.
    """
    right, wrong = int(table.is_correct_R.sum()), int(table.is_incorrect_R.sum())
    if not right or not wrong:
        raise CacheError(
            f"the objective prefers right rollouts to wrong ones: {right} are right and {wrong} are wrong; "
            "sample harder or easier prompts"
        )
    return table.is_correct_R.astype(np.float64) - table.is_incorrect_R
