"""Baseline, scales and shifts of an advantage. N = tokens, R = rollouts, K = support; nats."""

import torch
from torch import Tensor

from lightopd.objectives.base.divergences import support_weights
from lightopd.objectives.base.part import Scene
from lightopd.schemas.objectives.advantages import (
    CoefficientScale,
    ExpectedBaseline,
    GroupRewardShift,
    MarginShift,
    StepDriftScale,
)


def expected_baseline(config: ExpectedBaseline, scene: Scene) -> Tensor:
    """The student's expected advantage on the support, [N], detached; 0 where there is no support.

    The advantage of a token comes from full-vocabulary log-probabilities and only the student is
    renormalised: at the optimum of an extrapolated teacher this equals the constant advantage for any
    support, so the optimum is the online one. It does not depend on the sampled token.

    Source: after arXiv 2605.07865 (which renormalises both sides).
    """
    outcomes = scene.outcomes()
    advantage_NK = (outcomes.teacher_NM - outcomes.student_NM.detach())[:, :-1]
    baseline_N = (support_weights(outcomes) * advantage_NK).sum(-1)
    if config.ratio_cap is None:
        return baseline_N
    return baseline_N * scene.ratio_N().clamp(max=config.ratio_cap)


def margin_shift(config: MarginShift, scene: Scene, advantage_N: Tensor) -> Tensor:
    """Adds the rollout's prepared shift (arXiv 2605.03677)."""
    return advantage_N + scene.prepared_N("margin")


def group_reward_shift(config: GroupRewardShift, scene: Scene, advantage_N: Tensor) -> Tensor:
    """Adds coefficient times the group-normalised reward (arXiv 2605.07725, 2605.12227)."""
    return advantage_N + config.coefficient * scene.prepared_N("group_reward")


def step_drift_scale(config: StepDriftScale, scene: Scene, advantage_N: Tensor) -> Tensor:
    """Multiplies by min((d_1 + eps) / (d_k + eps), 1 + delta) of the token's turn; d from the rollout.

    The product over turns in the paper telescopes to this (arXiv 2605.07725, eqs. 6 and 7).
    """
    batch = scene.batch
    num_turns = batch.num_turns
    place_N = batch.row_N * num_turns + batch.turns_N
    gap_N = (scene.ref_logprobs_N() - scene.taught().logprobs_N).abs()
    cells = len(batch.lengths_R) * num_turns
    counted_N = batch.loss_mask_N.to(gap_N.dtype)
    total_C = gap_N.new_zeros(cells).index_add(0, place_N, gap_N * counted_N)
    count_C = gap_N.new_zeros(cells).index_add(0, place_N, counted_N)
    drift_RU = (total_C / count_C.clamp(min=1)).view(-1, num_turns)
    first_R1 = (count_C.view(-1, num_turns) > 0).to(torch.int64).argmax(1, keepdim=True)
    scale_RU = (drift_RU.gather(1, first_R1) + config.epsilon) / (drift_RU + config.epsilon)
    return advantage_N * scale_RU.clamp(max=1 + config.delta).view(-1)[place_N]


def coefficient_scale(config: CoefficientScale, scene: Scene, advantage_N: Tensor) -> Tensor:
    """Multiplies by a number."""
    return config.value * advantage_N
