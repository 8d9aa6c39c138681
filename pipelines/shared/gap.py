"""The gap between student and teacher on the cached tokens, and what it means for training."""

from typing import Any

from lightopd.cache.index import query
from lightopd.cache.store import Cache
from lightopd.schemas.configs import SamplingConfig

SMALL_NATS = 0.05
LARGE_NATS = 0.2


def gap_figures(cache: Cache, signal: str) -> dict[str, Any]:
    """Means over the trained tokens of one signal, nats per token; None where the student is unknown.

    `gap_nats` is the mean of student (at rollout) minus signal log-probability of the sampled tokens: an
    unbiased estimate of KL(student at rollout || signal) when rollouts were sampled at temperature 1.
    """
    sql = f"""select avg(gap) as gap_nats, avg(logprob_signal) as mean_logprob_nats,
    avg(exp(logprob_tail)) as mean_tail_mass
    from tokens where signal = '{signal}' and is_trained"""
    row = query(cache.path, sql).to_pylist()[0]
    return {str(key): value for key, value in row.items()}


def verdict(gap_nats: float | None, sampling: SamplingConfig | None) -> str:
    """One sentence on which objective the gap allows.

    The limits come from the trials behind docs/decisions/0002-demo-objective.md: at 0.045 nats per token
    every corrected objective gained, at 0.38 the plain sampled-token loss lost 15 points in 20 steps.
    """
    if gap_nats is None:
        return "gap unknown: the rollouts carry no student log-probabilities, so drift cannot be measured"
    if sampling is None or not sampling.is_raw:
        return (
            f"gap {gap_nats:.3f} nats/token is no KL divergence, since the rollouts were not sampled at "
            "temperature 1 from all tokens; compare it between caches only"
        )
    if gap_nats <= SMALL_NATS:
        return f"gap {gap_nats:.3f} nats/token is small: any recipe can be used"
    if gap_nats <= LARGE_NATS:
        return (
            f"gap {gap_nats:.3f} nats/token is moderate: prefer -c methods/recommended_topk_reverse_kl or "
            f"-c methods/recommended_baseline_ratio over the plain sampled-token loss"
        )
    return (
        f"gap {gap_nats:.3f} nats/token is large: fine-tune the student longer on this teacher's answers "
        f"first; the plain sampled-token loss is likely to make it worse"
    )
