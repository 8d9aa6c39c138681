"""How far the student has moved from the one that sampled the cache, and when the cache counts as stale.

s0 is the student at rollout, m the distribution that its tokens were drawn from: s0 with a temperature and a
truncation, s0 itself where there are none. The error of an offline gradient grows with the chi-square of the
student now against m (arXiv 2604.13010, theorem 3.5), but in one batch a single token can decide that number,
as it decides the effective sample size. So the verdict is one of numbers that no token can decide: the mean
log-ratio and the mean root of the ratio. Chi-square has a say only beyond its own standard error, and nothing
is decided by one step.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from lightopd.objectives.base.batch import MetricSums
from lightopd.schemas.finetune import StalenessLimits

# N = response tokens, w = student now / m at a drawn token

log = logging.getLogger(__name__)

STALE_STEPS = 3
"""Steps in a row past a limit that make a cache stale; all steps of a run that has fewer."""
STANDARD_ERRORS = 2
"""By how many of them chi-square must exceed its limit."""
STALE = "step %d: the cache is stale, past a limit for %d steps: %s; roll out again from the current student"
DRIFT_SUMS = (
    "w",
    "w_squared",
    "log_ratio_lost",
    "root_w",
    "root_w_at_rollout",
    "chi2",
    "chi2_growth",
    "growth_squared",
)
"""Names of `drift_sums`."""


def drift_sums(
    logprobs_N: Tensor, ref_logprobs_N: Tensor, behavior_logprobs_N: Tensor | None, loss_mask_N: Tensor
) -> MetricSums:
    """MetricSums and weights from which `drift_metrics` is made, float64, over the trained tokens.

    Args:
        logprobs_N: float32, nats, of the sampled tokens under the student now.
        ref_logprobs_N: float32, nats, of the same tokens under the student at rollout.
        behavior_logprobs_N: float32, nats, under m; None where m is the student at rollout.
        loss_mask_N: bool, True where the token is trained on.
    """
    mask_N = loss_mask_N.double()
    ref_N = ref_logprobs_N.double()
    behavior_N = ref_N if behavior_logprobs_N is None else behavior_logprobs_N.double()
    log_w_N = torch.where(loss_mask_N, logprobs_N.detach().double() - behavior_N, 0.0)
    log_start_N = torch.where(loss_mask_N, ref_N - behavior_N, 0.0)
    w_N = log_w_N.exp()
    chi2_N = log_w_N.expm1().square()
    growth_N = chi2_N - log_start_N.expm1().square()
    values = (
        w_N,
        w_N.square(),
        log_start_N - log_w_N,
        (log_w_N / 2).exp(),
        (log_start_N / 2).exp(),
        chi2_N,
        growth_N,
        growth_N.square(),
    )
    weight = mask_N.sum()
    return {name: ((each * mask_N).sum(), weight) for name, each in zip(DRIFT_SUMS, values, strict=True)}


def drift_metrics(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The logged drift over a step's trained tokens.

    Mean and spread of w and the effective sample size as a share of the tokens; chi-square E[(w - 1)^2] and
    the standard error of its growth since the rollout; `overlap`, the squared Bhattacharyya coefficient of
    the student now and m over that of the student at rollout and m; and the log-probability lost since the
    rollout, KL(s0 || now) where m is s0.

    Args:
        totals: sums and weights of `drift_sums` over the whole step.
    """
    mean = {name: totals[name][0] / totals[name][1] for name in DRIFT_SUMS}
    variance = max(0.0, mean["growth_squared"] - mean["chi2_growth"] ** 2)
    return {
        "w_mean": mean["w"],
        "w_std": max(0.0, mean["w_squared"] - mean["w"] ** 2) ** 0.5,
        "ess": mean["w"] ** 2 / mean["w_squared"] if mean["w_squared"] > 0 else 0.0,
        "chi2": mean["chi2"],
        "chi2_error": (variance / totals["w"][1]) ** 0.5,
        "overlap": (mean["root_w"] / mean["root_w_at_rollout"]) ** 2,
        "log_ratio_lost": mean["log_ratio_lost"],
    }


def exceeded_limits(metrics: Mapping[str, float], chi2_growth: float, limits: StalenessLimits) -> list[str]:
    """The limits that a step's drift passes, each as `name value (limit value)`; empty when all is well."""
    checks = [
        ("log_ratio_lost", metrics["log_ratio_lost"] > limits.max_log_ratio, limits.max_log_ratio),
        ("overlap", metrics["overlap"] < limits.min_overlap, limits.min_overlap),
        ("chi2", chi2_growth - STANDARD_ERRORS * metrics["chi2_error"] > limits.max_chi2, limits.max_chi2),
    ]
    return [f"{name} {metrics[name]:.3g} (limit {limit:g})" for name, is_passed, limit in checks if is_passed]


class DriftWatch:
    """Judges every step's drift, and says so the first time that the cache is stale.

    Args:
        limits: drift past which the cache counts as stale; None for never.
        steps: of the whole run.
        num_exceeded: steps in a row that passed a limit before the run was resumed.
    """

    def __init__(self, limits: StalenessLimits | None, steps: int, num_exceeded: int = 0) -> None:
        self.limits = limits
        self.needed_steps = min(STALE_STEPS, steps)
        self.num_exceeded = num_exceeded
        self._has_warned = False

    @property
    def ends_run(self) -> bool:
        """Whether the cache is stale after the last step, and the run is to end then."""
        is_stale = self.num_exceeded >= self.needed_steps
        return is_stale and self.limits is not None and self.limits.stop_when_stale

    def metrics(
        self, step: int, totals: Mapping[str, tuple[float, float]], *, is_speaking: bool
    ) -> dict[str, float]:
        """The step's drift and whether the cache is stale; nothing where the rollouts carry no student.

        Args:
            step: its number, from 1.
            totals: sums and weights over the whole step.
            is_speaking: whether this process may warn.
        """
        if "w" not in totals:
            return {}
        drift = drift_metrics(totals)
        growth, weight = totals["chi2_growth"]
        passed = exceeded_limits(drift, growth / weight, self.limits) if self.limits else []
        self.num_exceeded = self.num_exceeded + 1 if passed else 0
        is_stale = self.num_exceeded >= self.needed_steps
        if is_stale and not self._has_warned and is_speaking:
            log.warning(STALE, step, self.num_exceeded, ", ".join(passed))
            self._has_warned = True
        return {**drift, "stale": int(is_stale)}
