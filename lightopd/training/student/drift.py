"""How far the student has moved from the one that sampled the cache.

w = probability now / probability at rollout, of each cached token. The error of an offline gradient grows
with the chi-square of the student now against the student at rollout (arXiv 2604.13010, theorem 3.5); here it
is measured token by token.
"""

# N = response tokens

from collections.abc import Mapping

from torch import Tensor

from lightopd.objectives.base.batch import MetricSums
from lightopd.schemas.finetune import StalenessLimits


def drift_sums(logprobs_N: Tensor, ref_logprobs_N: Tensor, loss_mask_N: Tensor) -> MetricSums:
    """MetricSums and weights from which `drift_metrics` is made, float64, over the trained tokens.

    Args:
        logprobs_N: float32, nats, of the sampled tokens under the student now.
        ref_logprobs_N: float32, nats, of the same tokens under the student at rollout.
        loss_mask_N: bool, True where the token is trained on.
    """
    mask_N = loss_mask_N.double()
    log_w_N = (logprobs_N.detach().double() - ref_logprobs_N.double()) * mask_N
    w_N = log_w_N.exp() * mask_N
    weight = mask_N.sum()
    return {
        "w": (w_N.sum(), weight),
        "w_squared": (w_N.square().sum(), weight),
        "log_ratio_lost": (-log_w_N.sum(), weight),
    }


def drift_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """The logged drift: mean and spread of w, ESS as a share of the tokens, chi-square per token, nats lost.

    Args:
        means: means of w, w squared and the lost log-probability over the step's trained tokens.
    """
    mean, mean_square = means["w"], means["w_squared"]
    return {
        "w_mean": mean,
        "w_std": max(0.0, mean_square - mean * mean) ** 0.5,
        "ess": mean * mean / mean_square if mean_square > 0 else 0.0,
        "chi2": mean_square - 1.0,
        "log_ratio_lost": means["log_ratio_lost"],
    }


def exceeded_limits(metrics: Mapping[str, float], limits: StalenessLimits) -> list[str]:
    """The limits that a step's drift passes, each as `name value (limit value)`; empty when all is well."""
    checks = [
        ("ess", metrics["ess"] < limits.min_ess, limits.min_ess),
        ("chi2", metrics["chi2"] > limits.max_chi2, limits.max_chi2),
        ("log_ratio_lost", metrics["log_ratio_lost"] > limits.max_log_ratio, limits.max_log_ratio),
    ]
    return [f"{name} {metrics[name]:.3g} (limit {limit:g})" for name, is_passed, limit in checks if is_passed]
