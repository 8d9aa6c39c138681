"""From cached signals to a term's teacher: support, router, extrapolation.

N = tokens, K = support, M = K + 1 outcomes (support, then tail), J = support of the reference.
"""

import torch
from torch import Tensor

from lightopd.objectives.base.batch import RolloutBatch, SignalBatch, StudentTokens
from lightopd.objectives.base.divergences import finite, normalised_teacher
from lightopd.objectives.base.part import Needs, Outcomes, Teacher
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.targets import ConstantExtrapolation, DistanceExtrapolation


def teacher_names(term: TermConfig) -> tuple[str, ...]:
    """Signals that may teach a rollout of this term."""
    routed = tuple(term.router.signals.values()) if term.router else ()
    return tuple(dict.fromkeys((term.signal, *routed)))


def needs_teacher(config: object, term: TermConfig) -> Needs:
    """The teacher on the sampled token."""
    names = teacher_names(term)
    needs = Needs(signals=names, columns=("domain",) if term.router else ())
    if term.extrapolate is None:
        return needs
    needs |= Needs(signals=(term.extrapolate.reference,))
    return needs | _needs_support(term) if isinstance(term.extrapolate, DistanceExtrapolation) else needs


def needs_support(config: object, term: TermConfig) -> Needs:
    """The teacher and the live student on the teacher's support."""
    return needs_teacher(config, term) | _needs_support(term)


def _needs_support(term: TermConfig) -> Needs:
    names = teacher_names(term)
    references = (term.extrapolate.reference,) if term.extrapolate else ()
    return Needs(signals=(*names, *references), topk=(*names, *references), supports=names)


def build_teacher(term: TermConfig, batch: RolloutBatch, student: StudentTokens, needs: Needs) -> Teacher:
    """A term's teacher over the micro-batch; `needs` are those of all the term's parts."""
    signal, student_NM = _route(term, batch, student, bool(needs.supports))
    outcomes = None if student_NM is None else pair_outcomes(signal, student_NM)
    teacher = Teacher(signal.logprobs_N, signal.topk_ids_NK, signal.topk_logprobs_NK, outcomes, None)
    if term.extrapolate is None:
        return teacher
    return _extrapolate(term.extrapolate, teacher, batch.signals[term.extrapolate.reference])


def _route(
    term: TermConfig, batch: RolloutBatch, student: StudentTokens, with_support: bool
) -> tuple[SignalBatch, Tensor | None]:
    """The signal that teaches each token, and the student on its outcomes [N, K + 1]."""
    names = teacher_names(term)
    width = max(batch.signals[name].topk_ids_NK.shape[1] for name in names)
    signals = [_widen(batch.signals[name], width) for name in names]
    students = [_student_outcomes(student, name, width) for name in names] if with_support else []
    if len(names) == 1 or term.router is None:
        return signals[0], students[0] if students else None
    by_domain = term.router.signals
    chosen_R = [names.index(by_domain.get(domain or "", term.signal)) for domain in batch.domains]
    chosen_N = torch.tensor(chosen_R, device=batch.row_N.device)[batch.row_N]
    merged = SignalBatch(
        _choose([signal.logprobs_N for signal in signals], chosen_N),
        _choose([signal.topk_ids_NK for signal in signals], chosen_N),
        _choose([signal.topk_logprobs_NK for signal in signals], chosen_N),
        _choose([signal.tail_logprobs_N for signal in signals], chosen_N),
    )
    return merged, _choose(students, chosen_N) if students else None


def _choose(options: list[Tensor], chosen_N: Tensor) -> Tensor:
    tokens_N = torch.arange(len(chosen_N), device=chosen_N.device)
    return torch.stack(options)[chosen_N, tokens_N]


def _widen(signal: SignalBatch, width: int) -> SignalBatch:
    missing = width - signal.topk_ids_NK.shape[1]
    if not missing:
        return signal
    ids_NK = torch.nn.functional.pad(signal.topk_ids_NK, (0, missing), value=-1)
    logprobs_NK = torch.nn.functional.pad(signal.topk_logprobs_NK, (0, missing), value=float("-inf"))
    return SignalBatch(signal.logprobs_N, ids_NK, logprobs_NK, signal.tail_logprobs_N)


def _student_outcomes(student: StudentTokens, name: str, width: int) -> Tensor:
    topk_NK = student.topk_logprobs_NK[name]
    topk_NK = torch.nn.functional.pad(topk_NK, (0, width - topk_NK.shape[1]))
    return torch.cat([topk_NK, student.tail_logprobs_N[name][:, None]], dim=1)


def pair_outcomes(signal: SignalBatch, student_NM: Tensor) -> Outcomes:
    """Pairs the teacher's support and tail with the student's.

    A tail exists where the student has one: a teacher tail that float32 has lost stands at `FLOOR`.
    """
    teacher_NM = torch.cat([signal.topk_logprobs_NK, signal.tail_logprobs_N[:, None]], dim=1)
    has_tail_N1 = torch.isfinite(student_NM[:, -1:])
    is_real_NM = torch.cat([signal.topk_ids_NK >= 0, has_tail_N1], dim=1)
    return Outcomes(
        finite(teacher_NM).masked_fill(~is_real_NM, 0.0),
        student_NM.masked_fill(~is_real_NM, 0.0),
        is_real_NM,
    )


def _extrapolate(
    config: ConstantExtrapolation | DistanceExtrapolation, teacher: Teacher, reference: SignalBatch
) -> Teacher:
    """log T + strength (log T - log B), on the sampled token and on the common support.

    Source: arXiv 2602.12125 (constant), 2503.02832 (by distance).
    """
    if teacher.outcomes is None:
        assert isinstance(config, ConstantExtrapolation), "by_distance declares its support"
        strength_N = torch.full_like(teacher.logprobs_N, config.factor - 1)
        outcomes = None
    else:
        common, reference_NM = _common_support(teacher, teacher.outcomes, reference)
        strength_N = _strength(config, common, reference_NM)
        moved_NM = common.teacher_NM + strength_N[:, None] * (common.teacher_NM - reference_NM)
        outcomes = Outcomes(moved_NM, common.student_NM, common.is_real_NM)
    logprobs_N = teacher.logprobs_N + strength_N * (teacher.logprobs_N - reference.logprobs_N)
    return Teacher(logprobs_N, teacher.topk_ids_NK, teacher.topk_logprobs_NK, outcomes, strength_N)


def _strength(
    config: ConstantExtrapolation | DistanceExtrapolation, common: Outcomes, reference_NM: Tensor
) -> Tensor:
    if isinstance(config, ConstantExtrapolation):
        return common.teacher_NM.new_full((len(common.teacher_NM),), config.factor - 1)
    teacher_NM = normalised_teacher(common).teacher_NM
    models = Outcomes(reference_NM, common.student_NM, common.is_real_NM)
    distance_N = (teacher_NM.exp() - normalised_teacher(models).teacher_NM.exp()).abs().sum(-1)
    return config.scale * distance_N + config.floor


def _common_support(teacher: Teacher, outcomes: Outcomes, reference: SignalBatch) -> tuple[Outcomes, Tensor]:
    """Teacher, student and reference on the ids both models kept; all others join the tails.

    A token that only one model kept has no log-probability under the other, so log T - log B is known for the
    ids in both and for the sum of the rest. Each side's own tail is kept exact: what the reference kept alone
    is added to the tail that it stored, and never taken from one minus a sum, which would lose every tail
    below float32's 1e-7.
    """
    found_NK, reference_NK = align(teacher.topk_ids_NK, reference.topk_ids_NK, reference.topk_logprobs_NK)
    is_found_J = _is_in(reference.topk_ids_NK, teacher.topk_ids_NK)
    lost_NJ = reference.topk_logprobs_NK.masked_fill(is_found_J, float("-inf"))
    tail_N1 = torch.cat([lost_NJ, reference.tail_logprobs_N[:, None]], 1).logsumexp(-1, keepdim=True)
    is_kept_NK = outcomes.is_real_NM[:, :-1] & found_NK
    common = _into_tail(outcomes, is_kept_NK)
    reference_NM = finite(torch.cat([reference_NK, tail_N1], dim=1))
    return common, reference_NM.masked_fill(~common.is_real_NM, 0.0)


def _into_tail(outcomes: Outcomes, is_kept_NK: Tensor) -> Outcomes:
    """Moves the outcomes that are not kept into the tail; the probabilities stay exact.

    Masking comes before the sum and padding after it: a padded outcome is 0, probability one, and would swamp
    the tail. A row without a tail is summed over all its outcomes and then masked, because a logsumexp over
    nothing is -inf and its gradient NaN, which no later mask takes back.
    """
    is_tail_NM = torch.cat([~is_kept_NK, torch.ones_like(is_kept_NK[:, :1])], dim=1) & outcomes.is_real_NM
    has_tail_N1 = is_tail_NM.any(-1, keepdim=True)
    is_real_NM = torch.cat([is_kept_NK, has_tail_N1], dim=1)

    def moved(logprobs_NM: Tensor) -> Tensor:
        sunk_NM = logprobs_NM.masked_fill(~is_tail_NM & has_tail_N1, float("-inf"))
        tail_N1 = sunk_NM.logsumexp(-1, keepdim=True)
        return torch.cat([logprobs_NM[:, :-1], tail_N1], dim=1).masked_fill(~is_real_NM, 0.0)

    return Outcomes(moved(outcomes.teacher_NM), moved(outcomes.student_NM), is_real_NM)


def align(wanted_NK: Tensor, ids_NJ: Tensor, values_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Looks the wanted ids up in another support.

    Args:
        wanted_NK: int64, -1 at padding.
        ids_NJ: int64, -1 at padding, no id twice in a row.
        values_NJ: of those ids.

    Returns:
        bool [N, K], True where the id was found; and its value [N, K], -inf elsewhere.
    """
    if ids_NJ.shape[1] == 0 or wanted_NK.shape[1] == 0:
        found_NK = torch.zeros_like(wanted_NK, dtype=torch.bool)
        return found_NK, values_NJ.new_full(wanted_NK.shape, float("-inf"))
    sorted_NJ, order_NJ = ids_NJ.sort(dim=1)
    place_NK = torch.searchsorted(sorted_NJ, wanted_NK.contiguous()).clamp(max=ids_NJ.shape[1] - 1)
    found_NK = (sorted_NJ.gather(1, place_NK) == wanted_NK) & (wanted_NK >= 0)
    values_NK = values_NJ.gather(1, order_NJ.gather(1, place_NK))
    return found_NK, values_NK.masked_fill(~found_NK, float("-inf"))


def _is_in(ids_NJ: Tensor, other_NK: Tensor) -> Tensor:
    found_NJ, _ = align(ids_NJ, other_NK, torch.zeros_like(other_NK, dtype=torch.float32))
    return found_NJ
