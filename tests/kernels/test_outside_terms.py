"""Sums of terms over the vocabulary outside a few tokens, against a dense float64 reference."""

# N = positions, D = hidden size, V = vocabulary, K = tokens left out

import pytest
import torch
from kernel_cases import Case, LargestTensor, dense_logprobs, make_case
from torch import Tensor

from lightopd.kernels.outside_terms import Fixed, outside_terms
from lightopd.kernels.selected_logprobs import selected_logprobs
from lightopd.kernels.two_heads import Divergence

FORMS = [
    {},
    {"with_bias": True},
    {"softcap": 2.0},
    {"temperature": 0.6},
    {"with_bias": True, "softcap": 3.0, "temperature": 1.7},
]


def jensen_shannon(fixed: Tensor, student: Tensor) -> Tensor:
    mixed = torch.logaddexp(fixed, student) - torch.tensor(2.0).log()
    return (fixed.exp() * (fixed - mixed) + student.exp() * (student - mixed)) / 2


TERMS = {
    "cross entropy": lambda fixed, student: -fixed.exp() * student,
    "relative entropy of the student": lambda fixed, student: student.exp() * (student - fixed),
    "jensen-shannon": jensen_shannon,
    "mass": lambda fixed, student: student.exp(),
}


def fixed_of(case: Case, seed: int = 7) -> Fixed:
    generator = torch.Generator().manual_seed(seed)
    num_positions, num_vocab = len(case.hidden_ND), len(case.head_VD)
    order_NV = torch.rand(num_positions, num_vocab, generator=generator).argsort(1)
    ids_NK = order_NV[:, :5].clone()
    ids_NK[::3, 3:] = -1
    log_shape_V = torch.randn(num_vocab, generator=generator, dtype=torch.float64).log_softmax(0)
    shift_N = torch.randn(num_positions, generator=generator, dtype=torch.float64) - 1
    return Fixed(ids_NK, shift_N, log_shape_V)


def differentiated(terms) -> Divergence:
    """Sums and slopes of any terms, by autograd."""

    def both(fixed_CT: Tensor, logprobs_CT: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_CT = logprobs_CT.detach().requires_grad_()
            terms_CT = terms(fixed_CT, leaf_CT)
            return terms_CT.detach(), torch.autograd.grad(terms_CT.sum(), leaf_CT)[0]

    return Divergence(lambda *tile: tuple(each.sum(1) for each in both(*tile)), lambda *tile: both(*tile)[1])


def walked(case: Case, fixed: Fixed, terms, **sizes) -> Tensor:
    options = {"bias_V": case.bias_V, "softcap": case.softcap, "temperature": case.temperature}
    selected = selected_logprobs(case.hidden_ND, case.head_VD, case.ids_NM, **options, **sizes)
    normaliser_N = selected.logsumexp_N
    return outside_terms(
        case.hidden_ND, case.head_VD, fixed, normaliser_N, differentiated(terms), **options, **sizes
    )


def dense(case: Case, fixed: Fixed, terms) -> Tensor:
    logprobs_NV, _ = dense_logprobs(case)
    is_out_NV = torch.ones_like(logprobs_NV, dtype=torch.bool)
    for position, ids_K in enumerate(fixed.ids_NK):
        is_out_NV[position, ids_K[ids_K >= 0]] = False
    terms_NV = terms((fixed.shift_N[:, None] + fixed.log_shape_V).to(logprobs_NV.dtype), logprobs_NV)
    return (terms_NV * is_out_NV).sum(1)


def with_gradients(function, case: Case, *args, **sizes) -> list[Tensor]:
    """Value and gradients by hidden states, head and bias of a weighted sum over the positions."""
    inputs = (case.hidden_ND, case.head_VD, case.bias_V)
    leaves = [each.detach().requires_grad_() for each in inputs if each is not None]
    live = case._replace(**dict(zip(("hidden_ND", "head_VD", "bias_V"), leaves, strict=False)))
    value_N = function(live, *args, **sizes)
    weights_N = torch.linspace(-1, 2, len(value_N), dtype=value_N.dtype)
    return [value_N.detach(), *torch.autograd.grad((value_N * weights_N).sum(), leaves)]


def in_float64(case: Case) -> Case:
    return Case(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_values_and_gradients_equal_the_dense_reference(terms, form, dtype):
    case = make_case(seed=1, dtype=dtype, **form)
    fixed = fixed_of(case)
    found = with_gradients(walked, case, fixed, terms, chunk_tokens=5, tile_vocab=16)
    wanted = with_gradients(dense, in_float64(case), fixed, terms)
    for ours, theirs in zip(found, wanted, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_chunk_and_tile_sizes_do_not_change_results():
    case = make_case(seed=2, dtype=torch.float64, softcap=4.0, with_bias=True)
    whole = with_gradients(walked, case, fixed_of(case), jensen_shannon)
    for sizes in ({"chunk_tokens": 1, "tile_vocab": 1}, {"chunk_tokens": 3, "tile_vocab": 36}):
        for ours, theirs in zip(
            with_gradients(walked, case, fixed_of(case), jensen_shannon, **sizes), whole, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_normaliser_has_the_gradient_of_a_logsumexp():
    case = make_case(seed=3, dtype=torch.float64, softcap=3.0)

    def normaliser(live: Case) -> Tensor:
        return selected_logprobs(live.hidden_ND, live.head_VD, live.ids_NM, softcap=3.0).logsumexp_N

    found = with_gradients(normaliser, case)
    wanted = with_gradients(lambda live: dense_logprobs(live)[1].logsumexp(1), case)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_tensor_of_positions_times_vocabulary_is_made():
    case = make_case(shape=(64, 4, 2048, 3, 1))
    fixed = fixed_of(case)
    with LargestTensor() as largest:
        with_gradients(walked, case, fixed, jensen_shannon, chunk_tokens=8, tile_vocab=64)
    assert largest.num_elements < 64 * 2048 / 4


def test_a_shape_of_another_vocabulary_is_refused():
    case = make_case()
    fixed = fixed_of(case)._replace(log_shape_V=torch.zeros(36))
    with pytest.raises(ValueError, match="the shape has 36 entries, the head has 37 vocabulary entries"):
        walked(case, fixed, jensen_shannon)
