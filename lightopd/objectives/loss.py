"""The loss of a micro-batch: parts in their fixed order, divided by the totals of the optimiser step.

R = rollouts, N = their response tokens laid end to end; nats. `Loss.value` is the micro-batch's share: summed
over all micro-batches and devices of an optimiser step it is the step's loss, so the split does not matter.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightopd.objectives.base.batch import MetricSums, RolloutBatch, StudentTokens
from lightopd.objectives.base.part import Scene
from lightopd.objectives.base.segments import rollout_sums, token_mean
from lightopd.objectives.base.teacher import build_teacher, teacher_names
from lightopd.objectives.exposure import exposed
from lightopd.objectives.parts.registry import PARTS
from lightopd.objectives.requirements import term_needs
from lightopd.objectives.state import ObjectiveState, term_factor
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig
from lightopd.schemas.objectives.targets import LogRatioTarget, SignalRatioTarget


@dataclass(frozen=True, slots=True)
class Loss:
    """A micro-batch's share of the step's loss."""

    value: Tensor
    """Scalar, with gradient."""
    metrics: MetricSums
    """`loss` is the step's loss; others are means over trained tokens or rollouts, nats where not a share."""


def compute_loss(
    config: ObjectiveConfig,
    batch: RolloutBatch,
    student: StudentTokens,
    step_sums: MetricSums | None = None,
    state: ObjectiveState | None = None,
) -> Loss:
    """The objective's value on a micro-batch.

    Args:
        config: the objective.
        batch: cached side; `prepared_R` holds the columns of `prepare` where `needs(config).prepared`.
        student: live side, on the sampled tokens and on the supports that `needs(config)` names.
        step_sums: sums of `collect_step_sums` over the optimiser step, where `needs(config).step_sums`.
        state: state of the objective, where `needs(config).state`.
    """
    config, batch = exposed(config, state.exposure if state else None), with_rebuilt(batch, student)
    parts = [_term_loss(term, batch, student, step_sums or {}) for term in config.terms]
    value = student.logprobs_N.new_zeros(())
    metrics: MetricSums = {}
    share = (batch.lengths_R > 0).sum().float() / max(batch.totals.num_rollouts, 1)
    for term, part in zip(config.terms, parts, strict=True):
        value = value + term.weight * term_factor(config, state, term.name) * part.value
        prefix = "" if len(config.terms) == 1 else f"{term.name}/"
        metrics |= {f"{prefix}{name}": pair for name, pair in part.metrics.items()}
        metrics[f"{prefix}loss"] = (part.value.detach().float(), share)
    metrics["loss"] = (value.detach().float(), share)
    return Loss(value, metrics)


def collect_step_sums(
    config: ObjectiveConfig,
    batch: RolloutBatch,
    student: StudentTokens,
    state: ObjectiveState | None = None,
) -> MetricSums:
    """What parts must know of the whole optimiser step, as (sum, weight) of this micro-batch.

    Where `needs(config).step_sums`: call it without gradient on every micro-batch of the step, add both
    numbers over micro-batches and devices, and hand the sums to `compute_loss`. Else it is empty.
    """
    found: MetricSums = {}
    batch = with_rebuilt(batch, student)
    for term in exposed(config, state.exposure if state else None).terms:
        scene = _look(term, batch, student)
        of_target = PARTS[type(term.target)].step_sums
        if of_target is not None:
            named = of_target(term.target, scene)
            found |= {f"{term.name}/{name}": pair for name, pair in named.items()}
        for weight in term.rollout_weights:
            part = PARTS[type(weight)]
            if part.step_sums is not None:
                found[f"{term.name}/{weight.kind}"] = part.step_sums(weight, scene)
    return found


def with_rebuilt(batch: RolloutBatch, student: StudentTokens) -> RolloutBatch:
    """The batch with the signals whose top-k was made from hidden states."""
    return replace(batch, signals=batch.signals | student.rebuilt) if student.rebuilt else batch


def _look(
    term: TermConfig, batch: RolloutBatch, student: StudentTokens, step_sums: MetricSums | None = None
) -> Scene:
    wanted = term_needs(term)
    has_teacher = set(teacher_names(term)) <= set(wanted.signals)
    teacher = build_teacher(term, batch, student, wanted) if has_teacher else None
    return Scene(term, batch, student, teacher, step_sums or {})


def _term_loss(
    term: TermConfig,
    batch: RolloutBatch,
    student: StudentTokens,
    step_sums: MetricSums,
) -> Loss:
    scene = _look(term, batch, student, step_sums)
    rollout_weight_R = _rollout_weights(scene, step_sums)
    loss_mask_N = batch.loss_mask_N & (rollout_weight_R != 0)[batch.row_N]
    metrics: MetricSums = {}
    if scene.teacher is not None:
        gap_N = scene.teacher.logprobs_N - student.logprobs_N.detach()
        metrics["log_ratio"] = token_mean(gap_N, loss_mask_N)
    if term.target.gives == "rollout_loss":
        loss_R = _apply(term.target, scene) * (batch.lengths_R > 0) / max(batch.totals.num_rollouts, 1)
    else:
        loss_N, weight_N = _token_losses(scene, metrics, loss_mask_N)
        loss_R = _reduce(term, batch, loss_N * weight_N, weight_N)
    return Loss((loss_R * rollout_weight_R).sum(), metrics)


def _token_losses(scene: Scene, metrics: MetricSums, loss_mask_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and weight of each token, [N] each; the weights carry no gradient."""
    term, student = scene.term, scene.student
    advantage_N = None
    if term.target.gives == "advantage":
        advantage_N = _advantage(scene, metrics, loss_mask_N)
        loss_N = -advantage_N * student.logprobs_N
    else:
        loss_N = _apply(term.target, scene)
    weight_N = torch.ones_like(student.logprobs_N).detach()
    for config in term.token_weights:
        part_N = _apply(config, scene, advantage_N).to(weight_N.dtype)
        metrics[f"weight_{config.kind}"] = token_mean(part_N, loss_mask_N)
        weight_N = weight_N * part_N
    return loss_N, weight_N


def _advantage(scene: Scene, metrics: MetricSums, loss_mask_N: Tensor) -> Tensor:
    """Target, then baseline, then scales and shifts, then clip; [N], detached."""
    term = scene.term
    advantage_N = _apply(term.target, scene).to(scene.student.logprobs_N.dtype).detach()
    if term.baseline is not None:
        baseline_N = _apply(term.baseline, scene)
        metrics["baseline"] = token_mean(baseline_N, loss_mask_N)
        advantage_N = advantage_N - baseline_N
    for config in term.advantage:
        advantage_N = _apply(config, scene, advantage_N)
    limit = term.target.clip if isinstance(term.target, LogRatioTarget | SignalRatioTarget) else None
    if limit is not None:
        metrics["clipped"] = token_mean((advantage_N.abs() > limit).float(), loss_mask_N)
        advantage_N = advantage_N.clamp(-limit, limit)
    metrics["advantage"] = token_mean(advantage_N, loss_mask_N)
    return advantage_N


def _reduce(term: TermConfig, batch: RolloutBatch, loss_N: Tensor, weight_N: Tensor) -> Tensor:
    """Each rollout's share of the step's loss before rollout weights, [R]."""
    loss_R = rollout_sums(loss_N, batch)
    if term.reduce == "token_mean":
        return loss_R / max(batch.totals.num_tokens, 1)
    if term.normalise_token_weights:
        total_R = rollout_sums(weight_N, batch)
        loss_R = loss_R / torch.where(total_R > 0, total_R, torch.ones_like(total_R))
    elif term.reduce == "sequence_mean":
        loss_R = loss_R / batch.lengths_R.clamp(min=1)
    return loss_R / max(batch.totals.num_rollouts, 1)


def _rollout_weights(scene: Scene, step_sums: MetricSums) -> Tensor:
    """Product of prepared and live weights, [R], detached."""
    term, batch = scene.term, scene.batch
    prepared_R = batch.prepared_R.get(f"{term.name}/weight")
    weight_R = scene.student.logprobs_N.new_ones(len(batch.lengths_R)) if prepared_R is None else prepared_R
    for config in term.rollout_weights:
        if PARTS[type(config)].step_sums is not None:
            total, count = step_sums[f"{term.name}/{config.kind}"]
            weight_R = weight_R * _apply(config, scene, total / count)
    return weight_R.to(scene.student.logprobs_N.dtype)


def _apply(config: object, *arguments: object) -> Tensor:
    function = PARTS[type(config)].function
    assert function is not None, f"{type(config).__name__} has no function"
    values: Tensor = function(config, *arguments)
    return values
