"""Targets: what is computed at each token, before weights and reduction.

N = tokens, R = rollouts, P = pairs of rollouts; nats.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, logsigmoid

from lightopd.errors import ConfigError
from lightopd.objectives.base.batch import MetricSums
from lightopd.objectives.base.divergences import normalised_teacher, support_divergence, token_divergence
from lightopd.objectives.base.part import RATIO, Needs, Scene, WholeTail
from lightopd.objectives.base.segments import rollout_sums
from lightopd.objectives.base.teacher import needs_support, needs_teacher
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.targets import (
    CustomTarget,
    DivergenceTarget,
    EstimatorTarget,
    LogRatioTarget,
    MleTarget,
    PreferenceTarget,
    Residual,
    RewardTarget,
    SignalRatioTarget,
    UnpairedTarget,
)


def log_ratio(config: LogRatioTarget, scene: Scene) -> Tensor:
    """Advantage log T - log s of the sampled token, [N], detached.

    Source: arXiv 2604.13010, section 3; for an extrapolated T, 2602.12125, eq. 14 with the sign of the code.
    """
    is_live = config.student == "now"
    student_N = scene.student.logprobs_N.detach() if is_live else scene.ref_logprobs_N()
    return scene.taught().logprobs_N - student_N


def signal_ratio(config: SignalRatioTarget, scene: Scene) -> Tensor:
    """Advantage log T - log B of the sampled token, [N]; both are cached (arXiv 2605.25582, inferred)."""
    return scene.taught().logprobs_N - scene.batch.signals[config.reference].logprobs_N


def needs_signal_ratio(config: SignalRatioTarget, term: TermConfig) -> Needs:
    """Both signals on the sampled tokens."""
    return needs_teacher(config, term) | Needs(signals=(config.reference,))


def reward(config: RewardTarget, scene: Scene) -> Tensor:
    """The group-normalised reward of the rollout at each of its tokens, [N]."""
    return scene.prepared_N("reward")


def mle(config: MleTarget, scene: Scene) -> Tensor:
    """Negative log-likelihood of the sampled token, [N]."""
    return -scene.student.logprobs_N


def estimator(config: EstimatorTarget, scene: Scene) -> Tensor:
    """k2 = (log T - log s)^2 / 2, Huber's form of it, or k3 = T/s - 1 - log(T/s) of the sampled token, [N].

    Source: arXiv 2606.08432 (k3 with the log-ratio held below 20), 2609.35505 (Huber).
    """
    gap_N = scene.taught().logprobs_N - scene.student.logprobs_N
    if config.estimator == "k2":
        return gap_N.square() / 2
    if config.estimator == "huber":
        return huber_loss(gap_N, torch.zeros_like(gap_N), reduction="none", delta=config.delta)
    gap_N = gap_N.clamp(max=config.max_log_ratio)
    return gap_N.expm1() - gap_N


def divergence(config: DivergenceTarget, scene: Scene) -> Tensor:
    """Divergence between teacher and student over the support and its tail, or the whole vocabulary, [N]."""
    if config.tail != "bucket":
        outside_N = scene.student.outside_N[WholeTail(scene.term.name, scene.term.signal, config).key]
        return (
            outside_N if config.tail == "whole" else support_divergence(config, scene.outcomes()) + outside_N
        )
    loss_N = token_divergence(config, scene.outcomes())
    return loss_N if config.residual is None else loss_N + _residual(config, config.residual, scene)


def _residual(config: DivergenceTarget, residual: Residual, scene: Scene) -> Tensor:
    """eta 1[a outside K] sg[ratio h] log s(a), of value zero, [N].

    With g = log s - log T, of the token (a) or of the two tails (R), h = g_a - g_R for KL(s || T), and
    h = T_R / s_R - T_a / s_a for KL(T || s). In expectation over who sampled, with eta 1 and no cap or clip,
    it turns the gradient over K + 1 outcomes into the one over the vocabulary: the tail's term is
    E[1[a outside K] ratio f(g_R) grad log s(a)], which is taken off, and the same with g_a is put on. The two
    agree at s = T, so every single sample has gradient zero there.
    """
    teacher, outcomes = scene.taught(), normalised_teacher(scene.outcomes())
    gap_N = scene.student.logprobs_N - teacher.logprobs_N
    tail_gap_N = outcomes.student_NM[:, -1] - outcomes.teacher_NM[:, -1]
    if config.divergence == "reverse_kl":
        excess_N = gap_N - tail_gap_N
    else:
        excess_N = (-tail_gap_N).exp() - (-gap_N).exp()
    if residual.clip is not None:
        excess_N = excess_N.clamp(-residual.clip, residual.clip)
    is_outside_N = ~(teacher.topk_ids_NK == scene.batch.ids_N[:, None]).any(-1)
    ratio_N = scene.ratio_N() if residual.cap is None else scene.ratio_N().clamp(max=residual.cap)
    weight_N = residual.eta * ratio_N * excess_N.detach()
    # Where the token is inside, the tail may not exist and its gap means nothing: no 0 * inf.
    weight_N = torch.where(is_outside_N, weight_N, torch.zeros_like(weight_N))
    return weight_N * (scene.student.logprobs_N - scene.student.logprobs_N.detach())


def needs_divergence(config: DivergenceTarget, term: TermConfig) -> Needs:
    """Teacher and student on the support, or over the vocabulary; who sampled, for a residual."""
    tails = () if config.tail == "bucket" else (WholeTail(term.name, term.signal, config),)
    if config.tail == "whole":
        return needs_teacher(config, term) | Needs(hidden=(term.signal,), tails=tails)
    needs = needs_support(config, term) | (Needs() if config.residual is None else RATIO)
    return needs | Needs(tails=tails)


def preference(config: PreferenceTarget, scene: Scene) -> Tensor:
    """-log sigmoid(beta * margin) of the pair each rollout belongs to, [R].

    margin = (log s - log reference of the teacher's answer) - (the same of the student's own), as sums over
    trained tokens. Both rollouts of a pair carry the pair's loss, so a mean over rollouts is one over pairs.
    The plan of a run keeps pairs together; the loss of a rollout without its partner is NaN, which a step
    refuses: to look for it here would wait for the device.

    Source: arXiv 2604.03873, eqs. 3-5.
    """
    reference_N = scene.batch.signals[config.reference].logprobs_N
    gain_R = rollout_sums(scene.student.logprobs_N - reference_N, scene.batch)
    sign_R = scene.batch.prepared_R[f"{scene.term.name}/preferred"]
    is_pair_RR = scene.batch.groups_R[:, None] == scene.batch.groups_R
    is_whole_R = (is_pair_RR * sign_R).sum(1) == 0
    total_R = (is_pair_RR * (sign_R.to(gain_R.dtype) * gain_R)).sum(1)
    margin_R = total_R / (is_pair_RR.sum(1) / 2)  # a batch that straddles two epochs can hold a pair twice
    return -logsigmoid(config.beta * torch.where(is_whole_R, margin_R, torch.nan))


def unpaired(config: UnpairedTarget, scene: Scene) -> Tensor:
    """-log sigmoid(+-(rho - delta)) of each rollout, [R], so weighed that each outcome's mean counts once.

    rho = beta (log s - log s at rollout), summed over trained tokens; delta is half the sum of the mean rho
    of the step's right and of its wrong rollouts, without gradient (inferred), and where a step has one
    outcome alone, that one's mean. Rollouts without a reward give nothing.

    Source: arXiv 2605.15113, E-step.
    """
    rho_R = _prior_gain(config, scene)
    outcome_R = scene.prepared_R("outcome").to(rho_R.dtype)
    (right, num_right), (wrong, num_wrong) = (scene.step_sums[f"{scene.term.name}/{n}"] for n in OUTCOMES)
    mean_right, mean_wrong = right / num_right.clamp(min=1), wrong / num_wrong.clamp(min=1)
    num_kinds = (num_right > 0).to(rho_R.dtype) + (num_wrong > 0).to(rho_R.dtype)
    delta = ((mean_right + mean_wrong) / num_kinds.clamp(min=1)).to(rho_R.dtype)
    of_kind_R = torch.where(outcome_R > 0, num_right, num_wrong).clamp(min=1).to(rho_R.dtype)
    share_R = outcome_R.abs() * scene.batch.totals.num_rollouts / of_kind_R
    return -logsigmoid(outcome_R * (rho_R - delta)) * share_R


OUTCOMES = ("right", "wrong")


def outcome_sums(config: UnpairedTarget, scene: Scene) -> MetricSums:
    """Sum of rho, and number, of the right and of the wrong rollouts."""
    rho_R, outcome_R = _prior_gain(config, scene), scene.prepared_R("outcome")
    seen_R = scene.batch.lengths_R > 0
    of_kind = {name: (outcome_R * sign > 0) & seen_R for name, sign in zip(OUTCOMES, (1, -1), strict=True)}
    return {name: ((rho_R * is_R).sum(), is_R.sum().to(rho_R.dtype)) for name, is_R in of_kind.items()}


def _prior_gain(config: UnpairedTarget, scene: Scene) -> Tensor:
    gap_N = scene.student.logprobs_N - scene.ref_logprobs_N().to(scene.student.logprobs_N.dtype)
    return config.beta * rollout_sums(gap_N, scene.batch)


def custom(config: CustomTarget, scene: Scene) -> Tensor:
    """The loss of each token by a function of the user's, [N].

    Raises:
        ConfigError: the function does not exist, or does not return one value for each token.
    """
    loss_N = load_custom(config)(scene.batch, scene.student, dict(config.options))
    if not isinstance(loss_N, Tensor) or loss_N.shape != scene.student.logprobs_N.shape:
        found = tuple(loss_N.shape) if isinstance(loss_N, Tensor) else type(loss_N).__name__
        wanted = tuple(scene.student.logprobs_N.shape)
        raise ConfigError(
            f"{config.import_path} must return a tensor {wanted}, one loss a token; found {found}"
        )
    return loss_N


def load_custom(config: CustomTarget) -> Callable[..., object]:
    """The user's function.

    Raises:
        ConfigError: its module or it does not exist.
    """
    module, _, name = config.import_path.partition(":")
    try:
        function: Callable[..., object] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"import_path {config.import_path} cannot be loaded ({error}); check the name, and that the "
            f"module can be imported from here"
        ) from error
    return function


def needs_custom(config: CustomTarget, term: TermConfig) -> Needs:
    """What the recipe says that the function reads."""
    return Needs(
        signals=(*config.signals, *config.supports),
        topk=config.supports,
        supports=config.supports,
        columns=config.columns,
    )
