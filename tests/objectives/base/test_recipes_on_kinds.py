"""Shipped recipes on shaped tails and hidden states, held to float64 sums over the whole vocabulary."""

# N = tokens, V = vocabulary, E = hidden size of the teacher

from dataclasses import replace

import pytest
import torch
from objective_cases import METHODS
from one_rollout import one_rollout
from torch import Tensor
from vocabulary_cases import (
    HIDDEN_ND,
    SHAPE_V,
    TEACHER_NV,
    N,
    V,
    dense_divergence,
    loss_and_gradients,
    make_head,
    make_signal,
    rebuilt,
    student_logprobs,
)

from lightopd.models.head import Head
from lightopd.objectives.base.batch import SignalBatch
from lightopd.objectives.base.hidden_states import hidden_signals
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs, on_signals
from lightopd.pipelines.methods import list_methods
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.student.forward import evaluate_tokens

ALL = {method.name: method.objective for method in list_methods(METHODS)}
SHAPED = ["opsd", "tip", "tip_entropy", "recommended_topk_reverse_kl"]
SHAPED += [name for name, objective in ALL.items() if name.startswith("f_")]

IDS_N = torch.arange(N) * 3 % V


def with_tail(objective: ObjectiveConfig, tail: str) -> ObjectiveConfig:
    (term,) = objective.terms
    target = term.target.model_copy(update={"tail": tail})
    return ObjectiveConfig.model_validate(
        objective.model_copy(update={"terms": (term.model_copy(update={"target": target}),)}).model_dump()
    )


@pytest.mark.parametrize("name", SHAPED)
def test_a_recipe_with_a_shaped_tail_is_the_divergence_over_the_whole_vocabulary(name):
    objective = with_tail(ALL[name], "shaped")
    (term,) = objective.terms
    head, signal = make_head(), make_signal(TEACHER_NV)
    batch = one_rollout(IDS_N, {term.signal: signal})
    found = loss_and_gradients(objective, batch, HIDDEN_ND, head, {term.signal: SHAPE_V.numpy()})
    assert_reference(name, found, head, term.target.divergence, rebuilt(signal, SHAPE_V))


@pytest.mark.parametrize("name", SHAPED)
def test_a_recipe_on_hidden_states_is_the_divergence_over_the_whole_vocabulary(name):
    objective = with_tail(ALL[name], "whole")
    (term,) = objective.terms
    head = make_head()
    found, teacher_NV = gradients_on_hidden_states(objective, head)
    assert_reference(name, found, head, term.target.divergence, teacher_NV.exp())


def test_vopd_on_hidden_states_subtracts_the_expected_advantage_over_the_whole_vocabulary():
    head = make_head()
    (_, by_hidden_ND, by_weight_VD), teacher_NV = gradients_on_hidden_states(ALL["vopd"], head)
    weight_VD = head.weight_VD.detach().double().requires_grad_()
    hidden_ND = HIDDEN_ND.double().requires_grad_()
    student_NV = student_logprobs(hidden_ND, replace(head, weight_VD=weight_VD))
    gap_NV = teacher_NV - student_NV.detach()
    expected_N = (student_NV.detach().exp() * gap_NV).sum(1)
    places = torch.arange(N), IDS_N
    value = -((gap_NV[places] - expected_N) * student_NV[places]).mean()
    wanted = torch.autograd.grad(value, [hidden_ND, weight_VD])
    torch.testing.assert_close(by_hidden_ND.double(), wanted[0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(by_weight_VD.double(), wanted[1], rtol=2e-5, atol=2e-6)


def gradients_on_hidden_states(objective: ObjectiveConfig, head: Head) -> tuple[list[Tensor], Tensor]:
    """Loss and gradients on a signal of hidden states alone, and the teacher's own log-probabilities."""
    (term,) = objective.terms
    teacher = Head(torch.randn(V, 11, generator=torch.Generator().manual_seed(7)), None, None, 1.0)
    hidden_NE = torch.randn(N, 11, generator=torch.Generator().manual_seed(8))
    teacher_NV = (hidden_NE.double() @ teacher.weight_VD.double().T).log_softmax(1)
    none_N0, sampled_N = torch.zeros(N, 0), teacher_NV[torch.arange(N), IDS_N].float()
    signal = SignalBatch(sampled_N, none_N0.long(), none_N0, torch.zeros(N), hidden_ND=hidden_NE)
    batch = one_rollout(IDS_N, {term.signal: signal})
    wanted = on_signals(needs(objective), {term.signal: 0})
    hidden = hidden_signals(wanted, {term.signal: teacher}, V)
    leaf_ND = HIDDEN_ND.detach().requires_grad_()
    student = evaluate_tokens(leaf_ND, head, batch, wanted.supports, hidden=hidden)
    value = compute_loss(objective, batch, student).value
    return [value.detach(), *torch.autograd.grad(value, [leaf_ND, head.weight_VD])], teacher_NV


def assert_reference(name: str, found: list[Tensor], head: Head, divergence: str, teacher_NV: Tensor) -> None:
    """Value and gradients are those of the mean over the tokens that the recipe trains, in float64."""
    weight_VD = head.weight_VD.detach().double().requires_grad_()
    hidden_ND = HIDDEN_ND.double().requires_grad_()
    student_NV = student_logprobs(hidden_ND, replace(head, weight_VD=weight_VD)).exp()
    divergence_N = dense_divergence(divergence, teacher_NV, student_NV)
    # A recipe may choose tokens: those that it trains have a gradient by their hidden state.
    is_trained_N = found[1].abs().sum(1) > 0
    assert is_trained_N.any()
    assert bool(is_trained_N.all()) == (not name.startswith("tip"))
    value = divergence_N[is_trained_N].mean()
    wanted = [value.detach(), *torch.autograd.grad(value, [hidden_ND, weight_VD])]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)
