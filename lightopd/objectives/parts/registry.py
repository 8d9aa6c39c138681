"""Every part by the type of its config: the one place where a new part is named."""

from typing import Any

from lightopd.objectives.base.part import GROUPS, RATIO, REF, REWARDS, Needs, Part
from lightopd.objectives.base.teacher import needs_support, needs_teacher
from lightopd.objectives.parts import (
    advantages,
    best_of,
    chunks,
    columns,
    controls,
    selections,
    targets,
    weights,
)
from lightopd.objectives.parts import extrapolation_limit as limit
from lightopd.schemas.objectives import advantages as a
from lightopd.schemas.objectives import targets as t
from lightopd.schemas.objectives import weights as w

PARTS: dict[type[Any], Part] = {
    # targets
    t.LogRatioTarget: Part(
        targets.log_ratio,
        (needs_teacher, lambda config, term: REF if config.student == "rollout" else Needs()),
    ),
    t.SignalRatioTarget: Part(targets.signal_ratio, (targets.needs_signal_ratio,)),
    t.ConstantTarget: Part(controls.constant),
    t.RewardTarget: Part(targets.reward, (REWARDS, GROUPS), column=columns.group_reward),
    t.MleTarget: Part(targets.mle),
    t.EstimatorTarget: Part(targets.estimator, (needs_teacher,)),
    t.DivergenceTarget: Part(targets.divergence, (targets.needs_divergence,)),
    t.PreferenceTarget: Part(
        targets.preference,
        (GROUPS, lambda config, term: Needs(signals=(config.reference,), together=True)),
        column=columns.preferred,
    ),
    t.ChunkAuditTarget: Part(
        chunks.chunk_audit,
        (chunks.needs_chunks,),
        column=chunks.chunk_column,
        measures=chunks.chunk_measures,
    ),
    t.UnpairedTarget: Part(
        targets.unpaired,
        (REWARDS, REF, Needs(step_sums=True)),
        column=columns.outcome,
        step_sums=targets.outcome_sums,
    ),
    t.CustomTarget: Part(targets.custom, (targets.needs_custom,)),
    # router and extrapolation: built into the teacher, see teacher.py
    t.DomainRouter: Part(None, (needs_teacher,)),
    t.ConstantExtrapolation: Part(
        None,
        (needs_teacher, lambda config, term: Needs(prepared=config.guard is not None)),
        measures=limit.guard_measures,
        check=limit.check_guard,
    ),
    t.DistanceExtrapolation: Part(
        None, (needs_teacher, Needs(prepared=True)), measures=limit.tail_measures, check=limit.check_tail
    ),
    # baseline, scales and shifts
    a.ExpectedBaseline: Part(
        advantages.expected_baseline,
        (needs_support, lambda config, term: Needs() if config.ratio_cap is None else RATIO),
    ),
    a.MarginShift: Part(
        advantages.margin_shift,
        (needs_teacher, REWARDS, REF, lambda config, term: Needs(groups=config.scope == "group")),
        column=columns.margin,
        measures=columns.margin_measures,
    ),
    a.GroupRewardShift: Part(advantages.group_reward_shift, (REWARDS, GROUPS), column=columns.group_reward),
    a.ShuffleAdvantage: Part(controls.shuffle),
    a.StepDriftScale: Part(advantages.step_drift_scale, (needs_teacher, REF, Needs(columns=("turns",)))),
    a.CoefficientScale: Part(advantages.coefficient_scale),
    # token weights
    w.RatioWeight: Part(weights.ratio, (RATIO,)),
    w.PpoClipWeight: Part(weights.ppo_clip, (RATIO,)),
    w.LogRatioCutWeight: Part(weights.log_ratio_cut, (needs_teacher,)),
    w.TokenSelectionWeight: Part(weights.select_tokens, (weights.needs_selection,)),
    w.DriftFadeWeight: Part(weights.drift_fade, (weights.needs_drift_fade,)),
    w.HorizonWeight: Part(weights.horizon),
    w.OutsideChunksWeight: Part(
        chunks.outside_chunks,
        (chunks.needs_chunks,),
        column=chunks.chunk_column,
        measures=chunks.chunk_measures,
    ),
    w.InverseStrengthWeight: Part(weights.inverse_strength, (needs_teacher,)),
    # rollout weights
    w.PerplexityWeight: Part(
        None,
        (
            GROUPS,
            lambda config, term: REF if config.of == "student" else needs_teacher(config, term),
        ),
        column=columns.perplexity,
        measures=columns.perplexity_measures,
    ),
    w.ContrastWeight: Part(
        None,
        (needs_teacher, GROUPS, lambda config, term: Needs(signals=(config.negative,))),
        column=columns.contrast,
        measures=columns.contrast_measures,
    ),
    w.PivotWeight: Part(weights.pivots, (needs_teacher, Needs(step_sums=True)), step_sums=weights.pivot_sums),
    w.ConfidenceWeight: Part(
        None,
        (lambda config, term: Needs(texts=(config.text, *config.others), prepared=True),),
        column=columns.confidence,
        measures=columns.confidence_measures,
    ),
    w.DifficultyWeight: Part(None, (REWARDS, GROUPS), column=columns.difficulty),
    # selections
    w.MarginSelection: Part(
        selections.select_margin,
        (REWARDS, REF, lambda config, term: Needs(signals=(config.signal,))),
        measures=selections.margin_selection_measures,
    ),
    w.OutcomeBalanceSelection: Part(selections.select_balance, (REWARDS,)),
    w.PassRateSelection: Part(selections.select_pass_rate, (REWARDS,)),
    w.BestOfSelection: Part(
        best_of.select_best_of, (REWARDS, best_of.needs_best_of), measures=best_of.best_of_measures
    ),
    w.TeacherValidatedSelection: Part(
        selections.select_teacher_validated,
        (REWARDS, lambda config, term: Needs(columns=("teacher_reward",), answers=(config.answers,))),
    ),
}
