"""The gap between student and teacher on the cached tokens, and what it means for training.

`precompute` and `train` measure it once, here, and judge it by one table of limits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.index import query
from lightopd.cache.reader import read_columns
from lightopd.cache.signals.horizon import scored_tokens, spread
from lightopd.cache.store import Cache, Signal
from lightopd.cache.tables import flat_column
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig
from lightopd.schemas.objectives.targets import LogRatioTarget

# The limits come from docs/study.md and the trials behind docs/decisions/0002-demo-objective.md.
SMALL_NATS = 0.05
"""At 0.03 nats per token one pass at the best rate lost nothing (question 1)."""
LARGE_NATS = 0.2
"""At 0.2 all larger rates lost 5 points and more (question 2), at 0.38 15 points in 20 steps (trials)."""
SMALL_BATCH_TOKENS = 20_000
"""Steps of 600 to 20,000 response tokens lost (question 2); the paper's run has a million."""
SMALL_MOVE = 5e-4
"""Learning rate times steps: 4.6e-4 lost nothing, 8e-4 5 points and more (1, 2); the paper's is 3e-4."""
SHARDS = 8
"""Shards that are measured, evenly spaced; a large cache is not read as a whole for one line."""
TRIMMED = 0.005
"""Share of the tokens that the trimmed mean leaves out at either end."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Student (at rollout) minus signal log-probability of the trained tokens, nats per token.

    Its mean is an unbiased estimate of KL(student at rollout || signal) when rollouts were drawn at
    temperature 1.
    """

    nats: float
    error: float
    """Standard error of the mean, over rollouts: tokens of one rollout are not independent."""
    trimmed: float
    """Mean without the outliers."""

    def __str__(self) -> str:
        return f"gap {self.nats:.3f} +- {self.error:.3f} nats/token ({self.trimmed:.3f} without outliers)"


def some_shards(cache: Cache) -> list[int]:
    """Numbers of the shards that are measured for a report."""
    places = np.linspace(0, len(cache.shards) - 1, min(SHARDS, len(cache.shards))).astype(int)
    return [cache.shards[place] for place in places]


def measured_gap(cache: Cache, signal: str) -> Gap | None:
    """None where the cache has no log-probabilities of the student, or no trained token."""
    gaps: list[NDArray[np.float64]] = []
    sums: list[NDArray[np.float64]] = []
    counts: list[NDArray[np.float64]] = []
    for shard in some_shards(cache):
        rollouts = read_columns(cache, shard, ["logprobs", "loss_mask"])
        if rollouts.column("logprobs").null_count:
            return None
        scored = read_columns(cache, shard, ["logprobs"], signal)
        student_N, offsets = flat_column(rollouts.column("logprobs"))
        loss_mask_N, _ = flat_column(rollouts.column("loss_mask"))
        signal_N, _ = flat_column(scored.column("logprobs"))
        if (horizon := cache.signals[signal].manifest.horizon) is not None:
            is_scored_N = scored_tokens(horizon, offsets)
            signal_N, loss_mask_N = spread(signal_N, is_scored_N, 0.0), loss_mask_N & is_scored_N
        gap_N = np.where(loss_mask_N, student_N.astype(np.float64) - signal_N, 0.0)
        for values_N, found in ((gap_N, sums), (loss_mask_N.astype(np.float64), counts)):
            found.append(np.diff(np.concatenate([[0.0], np.cumsum(values_N)])[offsets]))
        gaps.append(gap_N[loss_mask_N])
    gap_N = np.sort(np.concatenate(gaps)) if gaps else np.zeros(0)
    if not len(gap_N):
        return None
    sum_R, count_R = np.concatenate(sums), np.concatenate(counts)
    nats = float(gap_N.mean())
    error = float(np.sqrt(np.square(sum_R - nats * count_R).sum())) / len(gap_N)
    cut = int(TRIMMED * len(gap_N))
    return Gap(nats, error, float(gap_N[cut : len(gap_N) - cut].mean()))


def gap_figures(cache: Cache, signal: str) -> dict[str, Any]:
    """Means over the trained tokens of one signal; None where the student is unknown."""
    gap = measured_gap(cache, signal)
    sql = f"""select avg(logprob_signal) as mean_logprob_nats, avg(exp(logprob_tail)) as mean_tail_mass
    from tokens where signal = '{signal}' and loss_mask"""
    row = query(cache.path, sql).to_pylist()[0]
    return {
        "gap_nats": gap and gap.nats,
        "gap_error_nats": gap and gap.error,
        "gap_trimmed_nats": gap and gap.trimmed,
        **{str(key): value for key, value in row.items()},
    }


def verdict(gap: Gap | None, sampling: SamplingConfig | None) -> str:
    """One sentence on which objective the gap allows."""
    if gap is None:
        return "gap unknown: the rollouts carry no student log-probabilities, so drift cannot be measured"
    if not is_divergence(sampling):
        return (
            f"{gap} is no KL divergence, since the rollouts were not sampled at temperature 1 from all "
            f"tokens; compare it between caches only"
        )
    if gap.nats <= SMALL_NATS:
        return (
            f"{gap} is small: little is left to gain from this teacher, so keep the learning rate low; "
            f"any recipe can be used with {SMALL_BATCH_TOKENS:,} response tokens a step or more"
        )
    if gap.nats <= LARGE_NATS:
        return f"{gap} is moderate: keep the default objective, reverse KL on the top-k"
    return (
        f"{gap} is large: fine-tune the student longer on this teacher's answers first; sampled-token losses "
        f"are likely to make it worse"
    )


def is_divergence(sampling: SamplingConfig | None) -> bool:
    """Whether the rollouts were drawn from the student's own distribution, so that the gap estimates a KL."""
    return sampling is not None and sampling.is_raw


def suggestion(
    cache: Cache,
    objective: ObjectiveConfig,
    *,
    steps: int,
    batch_sequences: int,
    learning_rate: float,
    student: str = "STUDENT",
    out: str = "RUN",
) -> str | None:
    """A line with the recommended recipe and its command where a sampled-token loss is likely to lose.

    A ratio or PPO's clip is no cure: recipes that carry one were among those that lost most. None where the
    objective may be kept.

    Args:
        cache: complete, with the objective's signals.
        objective: only a sampled-token advantage without a baseline can get a line.
        steps: a single step is taken from where the rollouts were sampled, so nothing can drift.
        batch_sequences: rollouts in a step.
        learning_rate: the highest of the schedule.
        student: path for the command.
        out: folder for the command.
    """
    risky = [term for term in objective.terms if is_sampled(term)]
    if not risky or steps == 1 or not is_divergence(cache.manifest.sampling) or not cache.num_rollouts:
        return None
    signal = risky[0].signal
    gap = measured_gap(cache, signal)
    reasons = gap and _reasons(cache.signals[signal], gap, steps, batch_sequences, learning_rate)
    if not reasons:
        return None
    lacks = "" if cache.signals[signal].manifest.top_k else ", once the signal has a top-k"
    return (
        f"{', '.join(reasons)}: the sampled-token loss is likely to lose here; "
        f"methods/recommended_topk_reverse_kl holds{lacks}: lightopd train -c "
        f"methods/recommended_topk_reverse_kl --cache {cache.path} --student {student} --out {out}"
    )


def _reasons(signal: Signal, gap: Gap, steps: int, batch_sequences: int, learning_rate: float) -> list[str]:
    """Why a sampled-token loss is likely to lose; a small batch and passes matter only once weights move."""
    rollouts = sum(marker.rows for marker in signal.markers)
    tokens = round(batch_sequences * sum(marker.tokens for marker in signal.markers) / rollouts)
    passes = steps * batch_sequences / rollouts
    reasons = [str(gap)] * (gap.nats > SMALL_NATS)
    if learning_rate * steps > SMALL_MOVE:
        reasons += [f"about {tokens:,} response tokens a step"] * (tokens < SMALL_BATCH_TOKENS)
        reasons += [f"{passes:.1f} passes over the cache"] * (passes > 1)
    return reasons


def is_sampled(term: TermConfig) -> bool:
    """Whether a term's loss is the log-ratio of the sampled token without a baseline."""
    return isinstance(term.target, LogRatioTarget) and term.baseline is None
