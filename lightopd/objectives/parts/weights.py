"""Weights of tokens and of rollouts, no gradient through any of them.

N = tokens, R = rollouts, K = support, L = longest response; nats.
"""

import torch
from torch import Tensor

from lightopd.objectives.base.divergences import reverse_kl
from lightopd.objectives.base.part import Needs, Scene
from lightopd.objectives.base.segments import flatten_rollouts, pad_rollouts, rollout_sums
from lightopd.objectives.base.teacher import align, needs_support, needs_teacher
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.weights import (
    DriftFadeWeight,
    HorizonWeight,
    InverseStrengthWeight,
    LogRatioCutWeight,
    PivotWeight,
    PpoClipWeight,
    RatioWeight,
    TokenSelectionWeight,
)


def ratio(config: RatioWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """min(student now / who sampled, cap), [N]."""
    return scene.ratio_N().clamp(max=config.cap)


def ppo_clip(config: PpoClipWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """The ratio where PPO's clipped objective has a gradient, 0 elsewhere, [N]."""
    assert advantage_N is not None, "the config refuses ppo_clip without an advantage"
    ratio_N = scene.ratio_N()
    is_up_N = advantage_N > 0
    is_open_N = torch.where(is_up_N, ratio_N < 1 + config.high, ratio_N > 1 - config.low)
    if config.dual is not None:
        is_open_N &= is_up_N | (ratio_N < config.dual)
    return ratio_N * is_open_N


def log_ratio_cut(config: LogRatioCutWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """1 where |log s - log T| < limit, [N]."""
    gap_N = scene.student.logprobs_N.detach() - scene.taught().logprobs_N
    return (gap_N.abs() < config.limit).to(gap_N.dtype)


def select_tokens(config: TokenSelectionWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """1 for the ceil(keep n) of a rollout's n trained tokens that score highest, [N]; ties by position."""
    batch = scene.batch
    score_N = _usefulness(config, scene)
    score_RL = pad_rollouts(torch.where(batch.loss_mask_N, score_N, float("-inf")), batch, float("-inf"))
    rank_RL = score_RL.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept_R1 = (config.keep * batch.lengths_R.double() - 1e-9).ceil()[:, None]
    return (flatten_rollouts((rank_RL < kept_R1).to(score_N.dtype), batch)) * batch.loss_mask_N


def _usefulness(config: TokenSelectionWeight, scene: Scene) -> Tensor:
    """Entropy, soft-OR of entropy and divergence, or confident and wrong (arXiv 2604.14084)."""
    entropy_N = _scaled(scene.student.entropies_N, config, scene)
    if config.score == "entropy":
        return entropy_N
    wrong_N = _scaled(reverse_kl(scene.outcomes()).detach(), config, scene)
    if config.score == "confident_wrong":
        return (1 - entropy_N) * wrong_N
    return entropy_N + wrong_N - entropy_N * wrong_N


def _scaled(values_N: Tensor, config: TokenSelectionWeight, scene: Scene) -> Tensor:
    """Min-max scaled within each rollout after cutting above its quantile; 0 where all are equal."""
    loss_mask_N = scene.batch.loss_mask_N
    padded_RL = pad_rollouts(torch.where(loss_mask_N, values_N, float("nan")), scene.batch, float("nan"))
    high_R1 = torch.nanquantile(padded_RL, config.winsorise, dim=1, keepdim=True)
    cut_RL = torch.minimum(padded_RL, high_R1)
    low_R1 = torch.where(cut_RL.isnan(), float("inf"), cut_RL).amin(1, keepdim=True)
    span_R1 = high_R1 - low_R1
    scaled_RL = torch.where(span_R1 > 0, (cut_RL - low_R1) / span_R1, torch.zeros_like(cut_RL))
    return flatten_rollouts(scaled_RL, scene.batch).nan_to_num()


def needs_selection(config: TokenSelectionWeight, term: TermConfig) -> Needs:
    """Nothing for entropy; else teacher and student on the support."""
    return Needs() if config.score == "entropy" else needs_support(config, term)


def drift_fade(config: DriftFadeWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """clip(1 - drop * bad tokens so far, 0, 1) + base, [N] (arXiv 2605.07804)."""
    is_bad_N = _lacks_overlap(config, scene) if config.bad == "overlap" else _outside_nucleus(config, scene)
    bad_RL = pad_rollouts((is_bad_N & scene.batch.loss_mask_N).float(), scene.batch, 0.0)
    so_far_N = flatten_rollouts(bad_RL.cumsum(1), scene.batch)
    return (1 - config.drop * so_far_N).clamp(0, 1) + config.base


def _lacks_overlap(config: DriftFadeWeight, scene: Scene) -> Tensor:
    teacher_NK = scene.taught().topk_ids_NK[:, : config.top_k]
    student_NK = scene.batch.signals[config.rollout_signal].topk_ids_NK[:, : config.top_k]
    found_NK, _ = align(student_NK, teacher_NK, torch.zeros_like(teacher_NK, dtype=torch.float32))
    return found_NK.sum(1) < config.threshold * (student_NK >= 0).sum(1)


def _outside_nucleus(config: DriftFadeWeight, scene: Scene) -> Tensor:
    """True where tokens more likely than the sampled one already hold the nucleus' mass."""
    topk_NK, sampled_N1 = scene.taught().topk_logprobs_NK, scene.taught().logprobs_N[:, None]
    is_above_NK = (scene.taught().topk_ids_NK != scene.batch.ids_N[:, None]) & (topk_NK > sampled_N1)
    return (topk_NK.exp() * is_above_NK).sum(1) >= config.threshold


def needs_drift_fade(config: DriftFadeWeight, term: TermConfig) -> Needs:
    """The teacher's top-k, and that of the student at rollout for `overlap`."""
    teachers = needs_teacher(config, term)
    own = (config.rollout_signal,) if config.bad == "overlap" else ()
    return teachers | Needs(signals=own, topk=(*teachers.signals, *own))


def horizon(config: HorizonWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """1 for the first tokens of each rollout's trained ones, 0 after them, [N]."""
    batch = scene.batch
    number_RL = pad_rollouts(batch.loss_mask_N.to(torch.int64), batch, 0).cumsum(1)
    if config.tokens is not None:
        kept_R = torch.full_like(batch.lengths_R, config.tokens)
    else:
        assert config.share is not None
        kept_R = (config.share * batch.lengths_R.double() - 1e-9).ceil().to(torch.int64)
    is_kept_N = flatten_rollouts(number_RL, batch) <= kept_R[batch.row_N]
    return (is_kept_N & batch.loss_mask_N).to(scene.student.logprobs_N.dtype)


def inverse_strength(config: InverseStrengthWeight, scene: Scene, advantage_N: Tensor | None) -> Tensor:
    """beta / alpha_t, [N] (arXiv 2503.02832)."""
    strength_N = scene.taught().strength_N
    assert strength_N is not None, "the config refuses inverse_strength without an extrapolation"
    return config.beta / strength_N


def pivots(config: PivotWeight, scene: Scene, mean: Tensor) -> Tensor:
    """Pivot weight of each rollout over its mean in the optimiser step, capped, [R] (arXiv 2606.23104)."""
    return (_pivot_scores(config, scene) / mean).clamp(max=config.cap)


def pivot_sums(config: PivotWeight, scene: Scene) -> tuple[Tensor, Tensor]:
    """Sum of the scores over rollouts with a trained token, and how many there are."""
    has_tokens_R = scene.batch.lengths_R > 0
    return (_pivot_scores(config, scene) * has_tokens_R).sum(), has_tokens_R.sum()


def _pivot_scores(config: PivotWeight, scene: Scene) -> Tensor:
    gap_N = (scene.student.logprobs_N.detach() - scene.taught().logprobs_N).clamp(max=config.cap_log_ratio)
    is_pivot_N = (gap_N >= config.threshold).to(gap_N.dtype)
    number_R = rollout_sums(is_pivot_N, scene.batch)
    mean_R = rollout_sums(gap_N * is_pivot_N, scene.batch) / number_R.clamp(min=1)
    return torch.where(number_R > 0, (mean_R / config.temperature).exp(), torch.ones_like(mean_R))
