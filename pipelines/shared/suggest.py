"""One line before training where the plain sampled-token loss is likely to make a student worse.

Offline that loss pushes a student away from the policy that sampled once it has moved; a small gap and a
large batch keep that small (docs/decisions/0002-demo-objective.md).
"""

import numpy as np

from lightopd.cache.reader import read_columns
from lightopd.cache.store import Cache
from lightopd.cache.tables import flat_column
from lightopd.pipelines.shared.gap import SMALL_NATS
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.objectives.targets import LogRatioTarget

SMALL_BATCH_TOKENS = 10_000
"""The trials lost at about 2,500 response tokens a step; the paper's run has a million."""
SHARDS = 8
"""Shards that the gap is measured on, evenly spaced; a large cache is not read as a whole for one line."""


def suggestion(
    cache: Cache,
    objective: ObjectiveConfig,
    *,
    steps: int,
    batch_sequences: int,
    student: str = "STUDENT",
    out: str = "RUN",
) -> str | None:
    """The line with the recommended recipes and the command; None where the objective may be kept.

    Args:
        cache: complete, with the objective's signals.
        objective: anything but the plain sampled-token loss needs no line.
        steps: a single step is taken from where the rollouts were sampled, so nothing can drift.
        batch_sequences: rollouts in a step.
        student: path for the command.
        out: folder for the command.
    """
    sampling = cache.manifest.sampling
    if not is_plain(objective) or steps == 1 or sampling is None:
        return None
    if not sampling.is_raw or not cache.num_rollouts:
        return None
    signal = objective.terms[0].signal
    gap_nats = measured_gap(cache, signal)
    batch_tokens = round(batch_sequences * cache.num_tokens / cache.num_rollouts)
    if gap_nats is None or (gap_nats <= SMALL_NATS and batch_tokens >= SMALL_BATCH_TOKENS):
        return None
    lacks = "" if cache.signals[signal].manifest.top_k else ", once the signal has a top-k"
    return (
        f"gap {gap_nats:.3f} nats/token, about {batch_tokens:,} response tokens a step: the plain "
        f"sampled-token loss is likely to lose here; methods/recommended_topk_reverse_kl and "
        f"methods/recommended_baseline_ratio hold{lacks}: lightopd train -c "
        f"methods/recommended_topk_reverse_kl --cache {cache.path} --student {student} --out {out}"
    )


def is_plain(objective: ObjectiveConfig) -> bool:
    """Whether it is the live sampled-token advantage, neither corrected by a baseline nor by a ratio."""
    if len(objective.terms) != 1:
        return False
    term = objective.terms[0]
    if not isinstance(term.target, LogRatioTarget) or term.baseline is not None:
        return False
    return not {weight.kind for weight in term.token_weights} & {"ratio", "ppo_clip"}


def measured_gap(cache: Cache, signal: str) -> float | None:
    """Mean of student (at rollout) minus signal log-probability over trained tokens, nats per token.

    None where the cache has no log-probabilities of the student, or no trained token.
    """
    places = np.linspace(0, len(cache.shards) - 1, min(SHARDS, len(cache.shards))).astype(int)
    total, count = 0.0, 0
    for shard in (cache.shards[place] for place in places):
        rollouts = read_columns(cache, shard, ["logprobs", "loss_mask"])
        if rollouts.column("logprobs").null_count:
            return None
        scored = read_columns(cache, shard, ["logprobs"], signal)
        student_N, _ = flat_column(rollouts.column("logprobs"))
        signal_N, _ = flat_column(scored.column("logprobs"))
        loss_mask_N, _ = flat_column(rollouts.column("loss_mask"))
        gap_N = student_N.astype(np.float64) - signal_N
        total, count = total + float(gap_N[loss_mask_N].sum()), count + int(loss_mask_N.sum())
    return total / count if count else None
