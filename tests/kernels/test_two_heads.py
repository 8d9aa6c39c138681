"""A divergence between a live head and a frozen one, against a dense float64 reference."""

# N = positions, D = hidden size, V = vocabulary

import pytest
import torch
from kernel_cases import Case, LargestTensor, dense_logprobs, make_case
from torch import Tensor

from lightopd.kernels.selected_logprobs import selected_logprobs
from lightopd.kernels.two_heads import Divergence, Frozen, divergence_of_heads

FORMS = [
    {},
    {"with_bias": True},
    {"softcap": 2.0},
    {"temperature": 0.6},
    {"with_bias": True, "softcap": 3.0, "temperature": 1.7},
]


def sums_of_reverse_kl(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
    terms_C = (student_CT * (logprobs_CT - teacher_CT)).sum(1)
    return terms_C - student_CT.sum(1) + teacher_CT.exp().sum(1), terms_C


REVERSE_KL = Divergence(sums_of_reverse_kl, lambda teacher, logprobs, student: student * (logprobs - teacher))


def frozen_case(num_positions: int = 13, num_vocab: int = 37, **form) -> Case:
    """Wider than the live side of `make_case`: 11 against 8."""
    return make_case(seed=8, shape=(num_positions, 11, num_vocab, 1, 1), **form)


def options_of(case: Case) -> dict:
    return {"bias_V": case.bias_V, "softcap": case.softcap, "temperature": case.temperature}


def walked(live: Case, teacher: Case, **sizes) -> Tensor:
    normaliser_N = normaliser_of(live, **sizes)
    frozen = Frozen(
        teacher.hidden_ND, teacher.head_VD, normaliser_of(teacher, **sizes), **options_of(teacher)
    )
    form = options_of(live)
    return divergence_of_heads(
        live.hidden_ND, live.head_VD, normaliser_N, frozen, REVERSE_KL, **form, **sizes
    )


def normaliser_of(case: Case, **sizes) -> Tensor:
    return selected_logprobs(
        case.hidden_ND, case.head_VD, case.ids_NM, **options_of(case), **sizes
    ).logsumexp_N


def dense(live: Case, teacher: Case) -> Tensor:
    student_NV, teacher_NV = dense_logprobs(live)[0], dense_logprobs(teacher)[0]
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(1)


def with_gradients(function, live: Case, teacher: Case, **sizes) -> list[Tensor]:
    """Value and gradients by hidden states, head and bias of a weighted sum over the positions."""
    inputs = (live.hidden_ND, live.head_VD, live.bias_V)
    leaves = [each.detach().requires_grad_() for each in inputs if each is not None]
    live = live._replace(**dict(zip(("hidden_ND", "head_VD", "bias_V"), leaves, strict=False)))
    value_N = function(live, teacher, **sizes)
    weights_N = torch.linspace(-1, 2, len(value_N), dtype=value_N.dtype)
    return [value_N.detach(), *torch.autograd.grad((value_N * weights_N).sum(), leaves)]


def in_float64(case: Case) -> Case:
    return Case(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("teacher_form", FORMS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_gradients_equal_the_dense_reference(form, teacher_form, dtype):
    live, teacher = make_case(seed=1, dtype=dtype, **form), frozen_case(dtype=dtype, **teacher_form)
    found = with_gradients(walked, live, teacher, chunk_tokens=5, tile_vocab=16)
    wanted = with_gradients(dense, in_float64(live), in_float64(teacher))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_chunk_and_tile_sizes_do_not_change_results():
    live, teacher = make_case(dtype=torch.float64, softcap=4.0), frozen_case(dtype=torch.float64)
    whole = with_gradients(walked, live, teacher)
    for sizes in ({"chunk_tokens": 1, "tile_vocab": 1}, {"chunk_tokens": 3, "tile_vocab": 36}):
        for ours, theirs in zip(with_gradients(walked, live, teacher, **sizes), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_frozen_side_in_bfloat16_is_read_as_the_numbers_it_holds():
    live, teacher = make_case(seed=1), frozen_case()
    half = teacher._replace(hidden_ND=teacher.hidden_ND.bfloat16(), head_VD=teacher.head_VD.bfloat16())
    found = with_gradients(walked, live, half)
    wanted = with_gradients(dense, in_float64(live), in_float64(half))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def test_the_frozen_side_gets_no_gradient():
    live, teacher = make_case(seed=1), frozen_case()
    teacher = teacher._replace(head_VD=teacher.head_VD.requires_grad_())
    leaf_ND = live.hidden_ND.detach().requires_grad_()
    walked(live._replace(hidden_ND=leaf_ND), teacher).sum().backward()
    assert leaf_ND.grad is not None
    assert teacher.head_VD.grad is None


def test_no_tensor_of_positions_times_vocabulary_is_made():
    live, teacher = make_case(shape=(64, 4, 2048, 3, 1)), frozen_case(64, 2048)
    with LargestTensor() as largest:
        with_gradients(walked, live, teacher, chunk_tokens=8, tile_vocab=64)
    assert largest.num_elements < 64 * 2048 / 4


def test_sides_that_do_not_fit_each_other_are_refused():
    live, teacher = make_case(), frozen_case()
    for narrow in (teacher._replace(head_VD=teacher.head_VD[:36]), frozen_case(num_positions=12)):
        frozen = Frozen(narrow.hidden_ND, narrow.head_VD, torch.zeros(len(narrow.hidden_ND)))
        with pytest.raises(ValueError, match=r"vocabulary entries, the live side 13 and 37"):
            divergence_of_heads(live.hidden_ND, live.head_VD, torch.zeros(13), frozen, REVERSE_KL)
    frozen = Frozen(teacher.hidden_ND[:, :9], teacher.head_VD, torch.zeros(13))
    with pytest.raises(ValueError, match=r"hidden \(13, 9\) and head \(37, 11\) of the frozen side"):
        divergence_of_heads(live.hidden_ND, live.head_VD, torch.zeros(13), frozen, REVERSE_KL)
