"""What is made of a signal's hidden states, against float64 sums over the whole vocabulary."""

# N = tokens, D = hidden size of the student, E = of the teacher, V = vocabulary, K = entries

from dataclasses import replace

import pytest
import torch
from one_rollout import one_rollout
from torch import Tensor
from vocabulary_cases import dense_divergence

from lightopd.errors import ConfigError
from lightopd.models.head import Head
from lightopd.objectives.base.batch import RolloutBatch, SignalBatch
from lightopd.objectives.base.hidden_states import hidden_signals
from lightopd.objectives.base.whole_vocabulary import spread_tails
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.plain_tensors import loss_from_logits
from lightopd.objectives.requirements import needs, on_signals
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.student.forward import evaluate_tokens

N, D, E, V = 9, 6, 11, 41
KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tv", "alpha"]
HEADS = {
    "plain": {},
    "bias and temperature": {"with_bias": True, "temperature": 0.7},
    "all": {"with_bias": True, "softcap": 2.5, "temperature": 1.4},
}


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(size: int, seed: int, with_bias=False, softcap=None, temperature=1.0) -> Head:
    bias_V = normal(seed + 1, V).float() if with_bias else None
    return Head(normal(seed, V, size).float(), bias_V, softcap, temperature)


def logprobs_of(hidden_NX: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """float64, over the whole vocabulary."""
    logits_NV = hidden_NX.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    if head.softcap is not None:
        logits_NV = head.softcap * (logits_NV / head.softcap).tanh()
    return (logits_NV / (head.temperature * temperature)).log_softmax(-1)


HIDDEN_ND = normal(3, N, D).float()
TEACHER_NE = normal(4, N, E).float()


def make_batch(teacher: Head, hidden_NE: Tensor = TEACHER_NE) -> RolloutBatch:
    """A signal that keeps hidden states and no top-k."""
    ids_N = torch.arange(N) * 3 % V
    sampled_N = logprobs_of(hidden_NE, teacher).gather(1, ids_N[:, None])[:, 0].float()
    none_N0 = torch.zeros(N, 0)
    signal = SignalBatch(sampled_N, none_N0.long(), none_N0, torch.zeros(N), hidden_ND=hidden_NE)
    return one_rollout(ids_N, {"teacher": signal})


def objective_of(kind: str, tail: str = "whole", entries=None, **keys) -> ObjectiveConfig:
    target = {"kind": "divergence", "divergence": kind, "tail": tail, **keys}
    term = {"target": target} | ({"entries": entries} if entries else {})
    return ObjectiveConfig.model_validate(term)


def loss_and_gradients(
    objective: ObjectiveConfig, teacher: Head, student: Head, hidden_ND: Tensor = HIDDEN_ND
) -> list[Tensor]:
    wanted = on_signals(needs(objective), {"teacher": 0})
    hidden = hidden_signals(wanted, {"teacher": teacher}, V)
    tails = spread_tails(wanted.tails, {}, V)
    leaves = [hidden_ND.detach().requires_grad_(), student.weight_VD.detach().requires_grad_()]
    batch, student = make_batch(teacher), replace(student, weight_VD=leaves[1])
    tokens = evaluate_tokens(leaves[0], student, batch, wanted.supports, tails, hidden)
    value = compute_loss(objective, batch, tokens).value
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def reference(value_of, teacher: Head, student: Head, hidden_ND: Tensor = HIDDEN_ND) -> list[Tensor]:
    """Of a function of both sides' log-probabilities [N, V] in float64: its mean, and gradients."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden_ND, student.weight_VD)]
    live = replace(student, weight_VD=leaves[1])
    value = value_of(
        lambda t: logprobs_of(TEACHER_NE, teacher, t), lambda t: logprobs_of(leaves[0], live, t)
    ).mean()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def divergence(kind: str, teacher_NM: Tensor, student_NM: Tensor) -> Tensor:
    """Of log-probabilities over all outcomes, [N]."""
    return dense_divergence(kind, teacher_NM.exp(), student_NM.exp())


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("form", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_divergence_is_the_one_over_the_vocabulary(kind, form):
    teacher, student = make_head(E, 5, **form), make_head(D, 1, **form)
    found = loss_and_gradients(objective_of(kind), teacher, student)
    assert_same(found, reference(lambda t, s: divergence(kind, t(1.0), s(1.0)), teacher, student))


@pytest.mark.parametrize(("own", "both"), [(0.5, 1.0), (1.0, 2.0), (0.8, 1.5)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_temperatures_of_the_teacher_and_of_both_are_those_of_the_logits(kind, own, both):
    teacher, student = make_head(E, 5, softcap=3.0), make_head(D, 1, temperature=0.8)
    objective = objective_of(kind, temperature=both, teacher_temperature=own)
    found = loss_and_gradients(objective, teacher, student)
    assert_same(
        found,
        reference(lambda t, s: both**2 * divergence(kind, t(own * both), s(both)), teacher, student),
    )


def bucketed(logprobs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """On the ids, then of all else, [N, K + 1]."""
    outside_NV = torch.ones_like(logprobs_NV, dtype=torch.bool).scatter(1, ids_NK, False)
    tail_N1 = logprobs_NV.masked_fill(~outside_NV, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logprobs_NV.gather(1, ids_NK), tail_N1], dim=1)


@pytest.mark.parametrize("of", ["teacher", "student"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_top_k_is_made_of_the_teacher_or_of_the_student_as_it_is_now(kind, of):
    teacher, student = make_head(E, 5, softcap=3.0), make_head(D, 1, with_bias=True)
    side = logprobs_of(TEACHER_NE, teacher) if of == "teacher" else logprobs_of(HIDDEN_ND, student)
    ids_NK = side.topk(5).indices
    objective = objective_of(kind, "bucket", {"top_k": 5, "of": of})
    found = loss_and_gradients(objective, teacher, student)
    wanted = reference(
        lambda t, s: divergence(kind, bucketed(t(1.0), ids_NK), bucketed(s(1.0), ids_NK)), teacher, student
    )
    assert_same(found, wanted)


def test_a_recipe_that_reads_a_top_k_gets_64_entries_or_all_there_are():
    teacher, student = make_head(E, 5), make_head(D, 1)
    found = loss_and_gradients(objective_of("reverse_kl", "bucket"), teacher, student)
    assert_same(found, reference(lambda t, s: divergence("reverse_kl", t(1.0), s(1.0)), teacher, student))


def test_entries_are_sorted_by_the_teacher_and_the_tail_is_summed():
    objective = objective_of("forward_kl", "bucket", {"top_k": 7, "of": "student"})
    teacher, student = make_head(E, 5, temperature=0.2), make_head(D, 1)
    wanted = on_signals(needs(objective), {"teacher": 0})
    batch = make_batch(teacher)
    hidden = hidden_signals(wanted, {"teacher": teacher}, V)
    signal = evaluate_tokens(HIDDEN_ND, student, batch, wanted.supports, hidden=hidden).rebuilt["teacher"]
    full_NV = logprobs_of(TEACHER_NE, teacher)
    assert bool((signal.topk_logprobs_NK.diff(dim=1) <= 0).all())
    outcomes_NM = bucketed(full_NV, signal.topk_ids_NK)
    found_NM = torch.cat([signal.topk_logprobs_NK, signal.tail_logprobs_N[:, None]], dim=1)
    torch.testing.assert_close(found_NM.double(), outcomes_NM, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        objective_of("jsd", temperature=1.5, teacher_temperature=0.7),
        objective_of("forward_kl", "bucket", {"top_k": 5, "of": "student"}),
        objective_of("forward_kl", "uniform", {"top_k": 5}),
    ],
    ids=["whole", "bucket", "uniform"],
)
def test_plain_logits_give_the_loss_that_the_trainer_computes(objective):
    teacher, student = make_head(E, 5, softcap=3.0), make_head(D, 1)
    logits_NV = (HIDDEN_ND @ student.weight_VD.T).requires_grad_()
    plain = loss_from_logits(objective, make_batch(teacher), logits_NV, heads={"teacher": teacher}).value
    walked = loss_and_gradients(objective, teacher, student)[0]
    torch.testing.assert_close(plain.detach(), walked, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="signal teacher, whose head is not given"):
        loss_from_logits(objective, make_batch(teacher), logits_NV)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    head = make_head(E, 5)
    for kind in KINDS:
        value, grad_NE, grad_VE = loss_and_gradients(objective_of(kind), head, head, TEACHER_NE)
        assert abs(float(value)) < 2e-6
        assert float(grad_NE.abs().max()) < 1e-6
        assert float(grad_VE.abs().max()) < 1e-6


def test_clipped_elements_are_those_of_the_whole_vocabulary():
    teacher, student = make_head(E, 5), make_head(D, 1)
    found = loss_and_gradients(objective_of("reverse_kl", element_clip=0.01), teacher, student)
    assert_same(
        found,
        reference(lambda t, s: (s(1.0).exp() * (s(1.0) - t(1.0))).clamp(0, 0.01).sum(1), teacher, student),
    )


def test_heads_and_hidden_states_that_do_not_fit_are_refused_in_one_line():
    wanted = needs(objective_of("reverse_kl"))
    teacher, student = make_head(E, 5), make_head(D, 1)
    with pytest.raises(ConfigError, match="the hidden states of signal teacher, whose head is not given"):
        hidden_signals(wanted, {}, V)
    with pytest.raises(
        ConfigError, match="head of signal teacher has 41 vocabulary entries, the student's has 40"
    ):
        hidden_signals(wanted, {"teacher": teacher}, 40)
    hidden = hidden_signals(wanted, {"teacher": make_head(E + 1, 5)}, V)
    with pytest.raises(ConfigError, match="hidden states of 11 numbers, its head reads 12; the head is not"):
        evaluate_tokens(HIDDEN_ND, student, make_batch(teacher), (), hidden=hidden)
    batch = make_batch(teacher)
    bare = replace(batch, signals={"teacher": replace(batch.signals["teacher"], hidden_ND=None)})
    with pytest.raises(ConfigError, match="the batch has no hidden states of signal teacher"):
        evaluate_tokens(HIDDEN_ND, student, bare, (), hidden=hidden_signals(wanted, {"teacher": teacher}, V))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target": {"tail": "whole", "support": "renormalised"}}, "it needs support: tail, no residual"),
        ({"target": {"tail": "bucket", "teacher_temperature": 0.5}}, "teacher_temperature needs tail: whole"),
        ({"target": {"tail": "bucket", "temperature": 2}}, "needs support: renormalised, or tail: whole"),
        ({"target": {"tail": "whole"}, "extrapolate": {"factor": 1.2}}, "leave extrapolate and router out"),
    ],
)
def test_what_a_whole_tail_cannot_go_with_is_refused_at_load(keys, message):
    target = {"kind": "divergence", **keys["target"]}
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig.model_validate({**keys, "target": target})


def test_two_terms_make_one_top_k_of_a_signal():
    term = {"target": {"kind": "divergence"}, "entries": {"top_k": 8}}
    other = {"name": "other", "target": {"kind": "divergence"}, "entries": {"top_k": 9}}
    with pytest.raises(ValueError, match="two terms give other entries for one signal"):
        ObjectiveConfig.model_validate({"terms": [term, other]})


def test_what_is_read_follows_what_the_signal_keeps():
    bucket = needs(objective_of("reverse_kl", "bucket"))
    assert on_signals(bucket, {}) == bucket
    assert on_signals(bucket, {"teacher": 32}) == bucket  # its own top-k comes first
    made = on_signals(bucket, {"teacher": 0})
    assert (made.topk, made.hidden) == ((), ("teacher",))
    chosen = on_signals(needs(objective_of("reverse_kl", "bucket", {"top_k": 8})), {"teacher": 32})
    assert (chosen.topk, chosen.hidden, chosen.entries[0][1].top_k) == ((), ("teacher",), 8)


def test_a_recipe_without_entries_is_written_as_it_was():
    plain = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}}).model_dump(mode="json")
    assert "entries" not in plain["terms"][0]
    assert "teacher_temperature" not in plain["terms"][0]["target"]
