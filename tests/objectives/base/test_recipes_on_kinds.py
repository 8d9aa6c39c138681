"""Shipped recipes on a shaped tail, value and gradient held to float64 sums over the whole vocabulary."""

# N = tokens, V = vocabulary

from dataclasses import replace

import pytest
import torch
from objective_cases import METHODS
from one_rollout import one_rollout
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

from lightopd.pipelines.methods import list_methods
from lightopd.schemas.objectives.objective import ObjectiveConfig

ALL = {method.name: method.objective for method in list_methods(METHODS)}
SHAPED = ["opsd", "tip", "tip_entropy", "recommended_topk_reverse_kl"]
SHAPED += [name for name, objective in ALL.items() if name.startswith("f_")]


def shaped(objective: ObjectiveConfig) -> ObjectiveConfig:
    (term,) = objective.terms
    target = term.target.model_copy(update={"tail": "shaped"})
    return ObjectiveConfig.model_validate(
        objective.model_copy(update={"terms": (term.model_copy(update={"target": target}),)}).model_dump()
    )


@pytest.mark.parametrize("name", SHAPED)
def test_a_recipe_with_a_shaped_tail_is_the_divergence_over_the_whole_vocabulary(name):
    objective = shaped(ALL[name])
    (term,) = objective.terms
    head, signal = make_head(), make_signal(TEACHER_NV)
    batch = one_rollout(torch.arange(N) * 3 % V, {term.signal: signal})
    found = loss_and_gradients(objective, batch, HIDDEN_ND, head, {term.signal: SHAPE_V.numpy()})

    weight_VD = head.weight_VD.detach().double().requires_grad_()
    hidden_ND = HIDDEN_ND.double().requires_grad_()
    student_NV = student_logprobs(hidden_ND, replace(head, weight_VD=weight_VD)).exp()
    divergence_N = dense_divergence(term.target.divergence, rebuilt(signal, SHAPE_V), student_NV)
    # A recipe may choose tokens: those that it trains have a gradient by their hidden state.
    is_trained_N = found[1].abs().sum(1) > 0
    assert is_trained_N.any()
    assert bool(is_trained_N.all()) == (not name.startswith("tip"))
    value = divergence_N[is_trained_N].mean()
    wanted = [value.detach(), *torch.autograd.grad(value, [hidden_ND, weight_VD])]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)
