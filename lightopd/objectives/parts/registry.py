"""Every part by the type of its config: the one place where a new part is named."""

from typing import Any

from lightopd.objectives.base import teacher
from lightopd.objectives.base.part import Part
from lightopd.objectives.parts import (
    advantages,
    columns,
    selections,
    targets,
    weights,
)
from lightopd.objectives.parts import extrapolation_limit as limit
from lightopd.schemas.objectives import targets as t
from lightopd.schemas.objectives import weights as w

PARTS: dict[type[Any], Part] = {
    # targets
    t.LogRatioTarget: Part(targets.log_ratio, "now", targets.needs_log_ratio),
    t.RewardTarget: Part(targets.reward, "none", advantages.needs_rewards, column=columns.group_reward),
    t.MleTarget: Part(targets.mle, "now"),
    t.EstimatorTarget: Part(targets.estimator, "now", teacher.needs_teacher),
    t.DivergenceTarget: Part(targets.divergence_target, "now", teacher.needs_support),
    t.PreferenceTarget: Part(
        targets.preference,
        "now",
        targets.needs_preference,
        column=columns.preferred,
    ),
    t.CustomTarget: Part(targets.custom, "now", targets.needs_custom),
    # router and extrapolation: built into the teacher, see teacher.py
    t.DomainRouter: Part(None, "none", teacher.needs_teacher),
    t.ConstantExtrapolation: Part(
        None,
        "none",
        limit.needs_extrapolation,
        measures=limit.guard_measures,
        check=limit.check_guard,
    ),
    t.DistanceExtrapolation: Part(None, "none", limit.needs_extrapolation),
    # baseline, scales and shifts
    t.ExpectedBaseline: Part(advantages.expected_baseline, "now", advantages.needs_baseline),
    t.MarginShift: Part(
        advantages.margin_shift,
        "rollout",
        advantages.needs_margin,
        column=columns.margin,
        measures=columns.margin_measures,
    ),
    t.GroupRewardShift: Part(
        advantages.group_reward_shift, "none", advantages.needs_rewards, column=columns.group_reward
    ),
    t.StepDriftScale: Part(advantages.step_drift_scale, "rollout", advantages.needs_step_drift),
    t.CoefficientScale: Part(advantages.coefficient_scale, "none"),
    # token weights
    w.RatioWeight: Part(weights.ratio, "now", weights.needs_ref),
    w.PpoClipWeight: Part(weights.ppo_clip, "now", weights.needs_ref),
    w.LogRatioCutWeight: Part(weights.log_ratio_cut, "now", teacher.needs_teacher),
    w.TokenSelectionWeight: Part(weights.select_tokens, "now", weights.needs_selection),
    w.DriftFadeWeight: Part(weights.drift_fade, "rollout", weights.needs_drift_fade),
    w.InverseStrengthWeight: Part(weights.inverse_strength, "none", teacher.needs_teacher),
    # rollout weights
    w.PerplexityWeight: Part(
        None,
        "rollout",
        columns.needs_perplexity,
        column=columns.perplexity,
        measures=columns.perplexity_measures,
    ),
    w.ContrastWeight: Part(
        None, "none", columns.needs_contrast, column=columns.contrast, measures=columns.contrast_measures
    ),
    w.PivotWeight: Part(weights.pivots, "now", weights.needs_pivots, statistics=weights.pivot_statistics),
    w.OutcomeBalanceWeight: Part(None, "none", columns.needs_outcomes, column=columns.outcome_balance),
    w.DifficultyWeight: Part(None, "none", advantages.needs_rewards, column=columns.difficulty),
    # selections
    w.MarginSelection: Part(
        selections.select_margin,
        "rollout",
        selections.needs_margin_selection,
        measures=selections.margin_selection_measures,
    ),
    w.OutcomeBalanceSelection: Part(selections.select_balance, "rollout", columns.needs_outcomes),
    w.PassRateSelection: Part(selections.select_pass_rate, "rollout", columns.needs_outcomes),
    w.TeacherValidatedSelection: Part(
        selections.select_teacher_validated, "rollout", selections.needs_teacher_validated
    ),
}
