"""Sums of the student's probabilities and logits against fixed vectors, against a dense float64 reference."""

# N = positions, V = vocabulary, F = vectors averaged by the student, G = vectors that average its logits

import pytest
import torch
from kernel_cases import Case, LargestTensor, Path, dense_logprobs, kernel_selected, make_case
from torch import Tensor

from lightopd.kernels.fixed_sums import FixedSums
from lightopd.kernels.selected_logprobs import selected_logprobs

FORMS = [
    {},
    {"with_bias": True},
    {"softcap": 2.0},
    {"temperature": 0.6},
    {"with_bias": True, "softcap": 3.0, "temperature": 1.7},
]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def vectors(num_vocab: int, dtype: torch.dtype, averaged: int = 2, weighing: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(11)
    kinds = {"averaged_FV": averaged, "weighing_GV": weighing}
    drawn = {name: torch.randn(n, num_vocab, generator=random).double() for name, n in kinds.items()}
    return {name: each.log_softmax(1).exp().to(dtype) * 3 for name, each in drawn.items()}


def found_sums(case: Case, given: dict[str, Tensor], **sizes: int) -> tuple[Tensor, ...]:
    names = ("member_NSM", "bias_V", "softcap", "temperature")
    options = {name: getattr(case, name) for name in names}
    there = {
        name: value.to(Path.device) if isinstance(value, Tensor) else value
        for name, value in (options | given | sizes).items()
    }
    inputs = [each.to(Path.device) for each in (case.hidden_ND, case.head_VD, case.ids_NM)]
    selected = selected_logprobs(*inputs, fused=Path.is_fused, **there)
    assert isinstance(selected.fixed, FixedSums)
    return tuple(each.cpu() for each in (*selected.fixed, selected.logprobs_NM, selected.logsumexp_N))


def dense_sums(case: Case, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logprobs_NV, logits_NV = dense_logprobs(case)
    return (
        -(logprobs_NV.exp() * logprobs_NV).sum(1),
        logprobs_NV.exp() @ given["averaged_FV"].to(logprobs_NV.dtype).T,
        logits_NV @ given["weighing_GV"].to(logprobs_NV.dtype).T,
        logprobs_NV.gather(1, case.ids_NM.clamp(min=0)).masked_fill(case.ids_NM < 0, 0.0),
        logits_NV.logsumexp(1),
    )


def with_gradients(function, case: Case, *args, **sizes) -> list[Tensor]:
    """The values, and the gradients of a fixed weighted sum of them all."""
    given = [each for each in (case.hidden_ND, case.head_VD, case.bias_V) if each is not None]
    leaves = [each.detach().clone().requires_grad_() for each in given]
    live = case._replace(**dict(zip(("hidden_ND", "head_VD", "bias_V"), leaves, strict=False)))
    values = function(live, *args, **sizes)
    random = torch.Generator().manual_seed(99)
    weights = [torch.randn(value.shape, generator=random, dtype=torch.float64) for value in values]
    loss = sum((value * weight.to(value.dtype)).sum() for value, weight in zip(values, weights, strict=True))
    return [value.detach() for value in values] + list(torch.autograd.grad(loss, leaves))


def in_float64(case: Case) -> Case:
    return Case(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case))


def assert_equal(case: Case, given: dict[str, Tensor], **sizes: int) -> None:
    tolerance = TOLERANCE[case.head_VD.dtype]
    found = with_gradients(found_sums, case, given, **sizes)
    wanted = with_gradients(dense_sums, in_float64(case), given)
    for ours, theirs in zip(found, wanted, strict=True):
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_values_and_gradients_equal_the_dense_reference(form, dtype):
    case = make_case(seed=1, dtype=dtype, **form)
    assert_equal(case, vectors(37, dtype), chunk_tokens=5, tile_vocab=16)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (3, 2)])
@pytest.mark.parametrize("shape", [(29, 16, 64, 40, 3), (7, 8, 50, 0, 0), (0, 8, 50, 3, 1), (6, 3, 1, 2, 0)])
def test_any_number_of_vectors_and_of_ids_is_taken(shape, counts):
    case = make_case(seed=2, shape=shape, dtype=torch.float32, softcap=3.0)
    given = vectors(shape[2], torch.float32, *counts)
    found = with_gradients(found_sums, case, given, tile_vocab=24)
    wanted = with_gradients(dense_sums, in_float64(case), given)
    # The entropy has a gradient where there is a vector to average, and only there.
    compared = 8 if counts[0] else 5
    for ours, theirs in list(zip(found, wanted, strict=True))[:compared]:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_entropy_is_detached_where_no_vector_is_averaged():
    case = make_case(seed=5)
    case = case._replace(hidden_ND=case.hidden_ND.requires_grad_())
    entropy_N, *_ = found_sums(case, {"weighing_GV": torch.ones(1, 37)})
    assert not entropy_N.requires_grad
    entropy_N, *_ = found_sums(case, {"averaged_FV": torch.ones(1, 37)})
    assert entropy_N.requires_grad


def test_a_position_whose_every_token_is_requested_is_summed_too():
    ids_NM = torch.arange(9).flip(0).expand(3, 9)
    case = make_case(shape=(3, 4, 9, 9, 1))._replace(ids_NM=ids_NM)
    assert_equal(case, vectors(9, torch.float32), tile_vocab=4)


def test_what_was_there_before_stays_bit_for_bit():
    case = make_case(seed=4, with_bias=True, softcap=3.0)
    bare, summed = kernel_selected(case), kernel_selected_with(case, vectors(37, torch.float32))
    for name in ("logprobs_NM", "tail_logprobs_NS", "logsumexp_N", "entropy_N"):
        assert torch.equal(getattr(bare, name), getattr(summed, name))
    assert bare.fixed is None


def kernel_selected_with(case: Case, given: dict[str, Tensor]):
    hidden_ND, head_VD, ids_NM, member_NSM, bias_V, softcap, temperature = case
    options = {"bias_V": bias_V, "softcap": softcap, "temperature": temperature}
    return selected_logprobs(hidden_ND, head_VD, ids_NM, member_NSM=member_NSM, **options, **given)


def test_no_tensor_of_positions_times_vocabulary_is_made():
    case = make_case(shape=(64, 4, 2048, 3, 1))
    with LargestTensor() as largest:
        with_gradients(found_sums, case, vectors(2048, torch.float32), chunk_tokens=8, tile_vocab=64)
    assert largest.num_elements < 64 * 2048 / 4


def test_a_vector_of_another_vocabulary_is_refused():
    case = make_case()
    with pytest.raises(ValueError, match=r"averaged \(1, 36\) must be \[vectors, V\] with V = 37"):
        kernel_selected_with(case, {"averaged_FV": torch.zeros(1, 36)})
