"""Divergences with a spread tail, against float64 sums over the whole vocabulary."""

# N = tokens, D = hidden size, V = vocabulary, K = support

import pytest
import torch
from vocabulary_cases import (
    HEADS,
    HIDDEN_ND,
    KINDS,
    SHAPE_V,
    TEACHER_NV,
    V,
    loss_and_gradients,
    make_batch,
    make_head,
    make_signal,
    objective_of,
    rebuilt,
    reference,
    student_logprobs,
)

from lightopd.errors import ConfigError
from lightopd.models.head import Head
from lightopd.objectives.base.whole_vocabulary import spread_tails
from lightopd.objectives.plain_tensors import loss_from_logits
from lightopd.objectives.requirements import needs
from lightopd.schemas.objectives.objective import ObjectiveConfig


@pytest.mark.parametrize("tail", ["shaped", "uniform"])
@pytest.mark.parametrize("form", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_whole_vocabulary(kind, form, tail):
    head, signal = make_head(**form), make_signal(TEACHER_NV)
    shape_V = SHAPE_V if tail == "shaped" else torch.full((V,), 1 / V)
    shapes = {"teacher": SHAPE_V.numpy()}
    found = loss_and_gradients(objective_of(kind, tail), make_batch(signal), HIDDEN_ND, head, shapes)
    wanted = reference(kind, rebuilt(signal, shape_V), HIDDEN_ND, head)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_logits_give_the_loss_that_the_trainer_computes(kind):
    head, batch, objective = make_head(), make_batch(make_signal(TEACHER_NV)), objective_of(kind)
    shapes = {"teacher": SHAPE_V.numpy()}
    walked = loss_and_gradients(objective, batch, HIDDEN_ND, head, shapes)[0]
    plain = loss_from_logits(objective, batch, HIDDEN_ND @ head.weight_VD.T, shapes).value
    torch.testing.assert_close(plain.detach(), walked, rtol=1e-5, atol=1e-6)


def test_a_signal_that_keeps_the_whole_vocabulary_has_nothing_outside():
    head, signal = make_head(), make_signal(TEACHER_NV, counts=(V,))
    for kind in KINDS:
        objective = objective_of(kind)
        found = loss_and_gradients(
            objective, make_batch(signal), HIDDEN_ND, head, {"teacher": SHAPE_V.numpy()}
        )
        wanted = reference(kind, TEACHER_NV.exp(), HIDDEN_ND, head)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


def test_the_bucket_is_a_lower_bound_of_the_spread_tail():
    head, batch = make_head(), make_batch(make_signal(TEACHER_NV))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        values = [
            loss_and_gradients(
                objective_of(kind, tail), batch, HIDDEN_ND, head, {"teacher": SHAPE_V.numpy()}
            )[0]
            for tail in ("bucket", "shaped", "uniform")
        ]
        assert values[0] < values[1]
        assert values[0] < values[2]


def test_a_student_that_is_the_rebuilt_teacher_has_no_loss_and_no_gradient():
    signal = make_signal(TEACHER_NV)
    teacher_NV = rebuilt(signal, SHAPE_V).log().float()
    head = Head(torch.eye(V, requires_grad=True), None, None, 1.0)
    for kind in KINDS:
        value, grad_NV, _ = loss_and_gradients(
            objective_of(kind), make_batch(signal), teacher_NV, head, {"teacher": SHAPE_V.numpy()}
        )
        assert abs(float(value)) < 2e-6
        if kind != "tv":  # its gradient is a sign
            assert float(grad_NV.abs().max()) < 1e-6


def test_clipped_elements_are_clipped_in_the_tail_too():
    head, signal = make_head(), make_signal(TEACHER_NV)
    objective = objective_of("reverse_kl", element_clip=0.01)
    found = loss_and_gradients(objective, make_batch(signal), HIDDEN_ND, head, {"teacher": SHAPE_V.numpy()})[
        0
    ]
    teacher_NV, student_NV = rebuilt(signal, SHAPE_V), student_logprobs(HIDDEN_ND, head).exp()
    wanted = (student_NV * (student_NV.log() - teacher_NV.log())).clamp(0, 0.01).sum(1).mean()
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-7)


def test_a_signal_without_a_shape_and_a_shape_of_another_vocabulary_are_refused():
    tails = needs(objective_of("forward_kl")).tails
    with pytest.raises(ConfigError, match="term main needs the shape of signal teacher's tail"):
        spread_tails(tails, {}, V)
    with pytest.raises(ConfigError, match=r"has 41 entries, the student's head has 40; score the signal"):
        spread_tails(tails, {"teacher": SHAPE_V.numpy()}, 40)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target": {"support": "renormalised"}}, "it needs support: tail, no residual"),
        ({"target": {"divergence": "forward_kl", "residual": {}}}, "it needs support: tail, no residual"),
        ({"extrapolate": {"factor": 1.2}}, "leave extrapolate and router out"),
        ({"router": {"kind": "by_domain", "signals": {"code": "coder"}}}, "leave extrapolate and router out"),
    ],
)
def test_what_a_spread_tail_cannot_go_with_is_refused_at_load(keys, message):
    target = {"kind": "divergence", "tail": "shaped", **keys.get("target", {})}
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig.model_validate({**keys, "target": target})


def test_a_recipe_without_a_tail_is_written_as_it_was():
    """A checkpoint from before the setting holds none, and resumes."""
    plain = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}})
    assert "tail" not in plain.model_dump(mode="json")["terms"][0]["target"]
