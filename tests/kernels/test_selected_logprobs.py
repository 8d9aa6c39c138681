"""The kernel against a dense float64 reference: values, gradients, edges, and the memory it may use."""

# N = positions, D = hidden size, V = vocabulary, M = ids requested per position, S = tail sets, K = own top-k

import pytest
import torch
from kernel_cases import (
    LargestTensor,
    Outcome,
    assert_agrees,
    dense_logprobs,
    dense_selected,
    kernel_selected,
    make_case,
    ours,
    outcome,
    reference,
)
from torch import Tensor

from lightopd.kernels.tile_types import Inputs, LogitGradient, Walk
from lightopd.kernels.vocabulary_walk import propagate, vocabulary_sums

pytestmark = pytest.mark.usefixtures("path")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
SHAPES = [
    (13, 8, 37, 5, 2),
    (1, 4, 11, 1, 1),
    (29, 16, 64, 40, 3),
    (7, 8, 50, 0, 0),
    (7, 8, 50, 0, 2),
    (0, 8, 50, 3, 1),
    (6, 3, 1, 2, 0),
    (9, 5, 23, 3, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [{}, {"chunk_tokens": 4, "tile_vocab": 7}])
def test_values_and_gradients_equal_the_dense_reference(shape, dtype, sizes):
    case = make_case(shape=shape, dtype=dtype)
    assert_agrees(outcome(case, kernel_selected, **sizes), reference(case), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (3.0, 1.0), (None, 0.6), (2.0, 1.7)])
def test_bias_softcap_and_temperature_equal_the_dense_reference(with_bias, softcap, temperature, dtype):
    options = {"softcap": softcap, "temperature": temperature}
    case = make_case(seed=1, dtype=dtype, with_bias=with_bias, **options)
    found = outcome(case, kernel_selected, chunk_tokens=5, tile_vocab=16)
    assert_agrees(found, reference(case), TOLERANCE[dtype])


@pytest.mark.parametrize("chunk_tokens", [1, 3, 13, 1000])
@pytest.mark.parametrize("tile_vocab", [1, 8, 36, 37, 1000])
def test_chunk_and_tile_sizes_do_not_change_results(chunk_tokens, tile_vocab):
    case = make_case(seed=2, with_bias=True, softcap=4.0)
    cut = outcome(case, kernel_selected, chunk_tokens=chunk_tokens, tile_vocab=tile_vocab)
    assert_agrees(cut, outcome(case, kernel_selected), 1e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.7}])
def test_gradcheck_in_float64(options):
    case = make_case(seed=3, shape=(4, 3, 9, 3, 2), dtype=torch.float64, with_bias=True, **options)
    names = ("hidden_ND", "head_VD", "bias_V")

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        live = case._replace(**dict(zip(names, leaves, strict=True)))
        selected = kernel_selected(live, chunk_tokens=3, tile_vocab=4)
        return selected.logprobs_NM, selected.tail_logprobs_NS

    assert torch.autograd.gradcheck(function, [getattr(case, name).requires_grad_() for name in names])


def test_hand_computed_values():
    # Logits 0, log 2, log 3, log 4: probabilities 0.1, 0.2, 0.3, 0.4.
    head_VD = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[:, None].requires_grad_()
    ids_NM = torch.tensor([[3, 1, 3]])
    member_NSM = torch.tensor([[[True, True, True], [False, True, False]]])
    selected = ours(torch.ones(1, 1), head_VD, ids_NM, member_NSM=member_NSM)
    torch.testing.assert_close(selected.logprobs_NM.exp(), torch.tensor([[0.4, 0.2, 0.4]]))
    torch.testing.assert_close(selected.tail_logprobs_NS.exp(), torch.tensor([[0.4, 0.8]]))
    torch.testing.assert_close(selected.logsumexp_N, torch.tensor([10.0]).log())
    selected.tail_logprobs_NS[0, 0].backward()
    # Outside are 0.1 and 0.3 of 0.4; p_v / tail - p_v outside the set, -p_v inside.
    torch.testing.assert_close(head_VD.grad[:, 0], torch.tensor([0.15, -0.2, 0.45, -0.4]))


def test_padding_is_zero_with_zero_gradient_and_in_no_set():
    case = make_case(seed=4, shape=(6, 8, 37, 3, 1))
    padded_NM = torch.cat([case.ids_NM, torch.full((6, 2), -1)], dim=1)
    member_NSM = torch.cat([case.member_NSM, torch.ones(6, 1, 2, dtype=torch.bool)], dim=2)
    padded = kernel_selected(case._replace(ids_NM=padded_NM, member_NSM=member_NSM))
    assert (padded.logprobs_NM[:, 3:] == 0).all()
    assert torch.equal(padded.tail_logprobs_NS, kernel_selected(case).tail_logprobs_NS)
    hidden_ND = case.hidden_ND.clone().requires_grad_()
    ours(hidden_ND, case.head_VD, padded_NM).logprobs_NM[:, 3:].sum().backward()
    assert (hidden_ND.grad == 0).all()


@pytest.mark.parametrize("gap", [27.6, 60.0, 400.0])
def test_tiny_tails_keep_their_value_and_gradient(gap):
    # One token holds all the mass but exp(-gap); 27.6 nats is a tail of 1e-12, 400 is beyond float32.
    case = make_case(seed=5, shape=(3, 4, 33, 1, 1))._replace(
        member_NSM=torch.ones(3, 1, 1, dtype=torch.bool)
    )
    case = case._replace(ids_NM=torch.tensor([[2], [20], [32]]), bias_V=torch.zeros(33))
    case.hidden_ND[:] = torch.eye(3, 4)
    case.head_VD[:] *= 0.1
    for n, token in enumerate(case.ids_NM[:, 0].tolist()):
        case.head_VD[token, n] += gap + 5.0
    found, wanted = outcome(case, kernel_selected, tile_vocab=8), reference(case)
    assert wanted.tail_logprobs_NS.max() < -gap
    assert_agrees(found, wanted, 1e-6)
    torch.testing.assert_close(found.tail_logprobs_NS, wanted.tail_logprobs_NS, rtol=1e-6, atol=0)


def test_a_set_that_holds_the_whole_vocabulary_has_no_tail_and_no_gradient():
    hidden_ND = torch.randn(2, 4, generator=torch.Generator().manual_seed(6)).requires_grad_()
    head_VD = torch.randn(9, 4, generator=torch.Generator().manual_seed(7)).requires_grad_()
    ids_NM = torch.arange(9).flip(0).expand(2, 9)
    member_NSM = torch.ones(2, 1, 9, dtype=torch.bool)
    member_NSM[1, 0, 4] = False
    selected = ours(hidden_ND, head_VD, ids_NM, member_NSM=member_NSM, tile_vocab=4)
    assert selected.tail_logprobs_NS[0, 0] == -torch.inf
    torch.testing.assert_close(selected.tail_logprobs_NS[1, 0], selected.logprobs_NM[1, 4])
    torch.testing.assert_close(selected.logprobs_NM.exp().sum(1), torch.ones(2))
    entropy_N = -(selected.logprobs_NM.exp() * selected.logprobs_NM).sum(1)
    torch.testing.assert_close(selected.entropy_N, entropy_N.detach())
    grads = torch.autograd.grad(selected.tail_logprobs_NS[0, 0], (hidden_ND, head_VD), retain_graph=True)
    assert all((grad == 0).all() for grad in grads)
    # The gradient of x * exp(x) is NaN at minus infinity; it must not spread from the tail to the weights.
    loss = (selected.tail_logprobs_NS * selected.tail_logprobs_NS.exp()).sum() + selected.logprobs_NM.sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (hidden_ND, head_VD)))


def test_large_logits_lose_nothing_to_the_size_of_the_normaliser():
    # Multiples of 1/8 below 2048 are exact in float32, so an error could only come from the normaliser.
    case = make_case(seed=8)._replace(bias_V=torch.full((37,), 1024.0))
    raised = case._replace(hidden_ND=(case.hidden_ND * 8).round() / 8, head_VD=(case.head_VD * 2).round())
    found, wanted = outcome(raised, kernel_selected, tile_vocab=8), reference(raised)
    assert wanted.logsumexp_N.min() > 1024
    assert_agrees(found._replace(logsumexp_N=wanted.logsumexp_N), wanted, 1e-6)


def test_inputs_need_not_be_contiguous():
    case = make_case(seed=17)
    hidden_ND, head_VD = case.hidden_ND.T.contiguous().T, case.head_VD.repeat(1, 2)[:, :8]
    strided = kernel_selected(case._replace(hidden_ND=hidden_ND, head_VD=head_VD), tile_vocab=10)
    wanted = kernel_selected(case, tile_vocab=10)
    torch.testing.assert_close(strided.logprobs_NM, wanted.logprobs_NM, rtol=0, atol=1e-6)


def test_a_tied_head_receives_both_gradients():
    case = make_case(seed=9)
    tokens_N = torch.arange(13)
    grads = []
    for compute, dtype in ((kernel_selected, torch.float32), (dense_selected, torch.float64)):
        head_VD = case.head_VD.to(dtype).requires_grad_()
        tied = case._replace(hidden_ND=head_VD[tokens_N].tanh(), head_VD=head_VD)
        grads.append(torch.autograd.grad(compute(tied).logprobs_NM.sum(), head_VD)[0].double())
    torch.testing.assert_close(*grads, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("dtype", "half_ulp"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_inputs_cost_only_the_rounding_of_the_gradients(dtype, half_ulp):
    # Products are float32 products of the rounded inputs, so values are as exact as for float32 inputs.
    case = make_case(seed=10, shape=(64, 32, 200, 9, 2), dtype=dtype, with_bias=True)
    found, wanted = outcome(case, kernel_selected, chunk_tokens=16, tile_vocab=64), reference(case)
    assert_agrees(Outcome(*found[:4], *wanted[4:]), wanted, 1e-6)
    for gradient, expected in zip(found[4:], wanted[4:], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=half_ulp, atol=1e-5)


def test_autocast_changes_nothing():
    case = make_case(seed=11)
    wanted = outcome(case, kernel_selected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outcome(case, kernel_selected)
    assert_agrees(found, wanted, 0.0)


@pytest.mark.parametrize("own_top_k", [1, 5, 37])
@pytest.mark.parametrize("tile_vocab", [4, 37])
def test_own_top_k_is_the_top_k_of_the_full_distribution(own_top_k, tile_vocab):
    case = make_case(seed=12, softcap=5.0, temperature=0.8)
    selected = kernel_selected(case, own_top_k=own_top_k, tile_vocab=tile_vocab, chunk_tokens=5)
    doubled = case._replace(hidden_ND=case.hidden_ND.double(), head_VD=case.head_VD.double())
    wanted = dense_logprobs(doubled)[0].topk(own_top_k)
    assert torch.equal(selected.topk_ids_NK, wanted.indices)
    torch.testing.assert_close(selected.topk_logprobs_NK.double(), wanted.values, rtol=1e-6, atol=1e-6)


def test_the_entropy_is_detached_and_own_top_k_only_on_request():
    case = make_case(seed=13)
    case.hidden_ND.requires_grad_()
    selected = kernel_selected(case, own_top_k=2)
    live = (selected.logprobs_NM, selected.tail_logprobs_NS, selected.logsumexp_N)
    assert all(value.requires_grad for value in live)
    for value in (selected.entropy_N, selected.topk_ids_NK, selected.topk_logprobs_NK):
        assert not value.requires_grad
    assert kernel_selected(case).topk_ids_NK is None
    assert kernel_selected(case).topk_logprobs_NK is None


@pytest.mark.parametrize("needed", ["hidden_ND", "head_VD", "bias_V"])
def test_only_the_gradients_that_are_needed_are_computed(needed):
    case = make_case(seed=14, with_bias=True)
    getattr(case, needed).requires_grad_()
    with LargestTensor() as watched:
        kernel_selected(case).logprobs_NM.sum().backward()
    for name in ("hidden_ND", "head_VD", "bias_V"):
        assert (getattr(case, name).grad is not None) == (name == needed)
    assert watched.num_products == 2 + (needed != "bias_V")


def test_no_tensor_comes_near_the_size_of_the_logits():
    case = make_case(seed=15, shape=(512, 4, 4096, 9, 2), softcap=5.0)
    for tensor in (case.hidden_ND, case.head_VD):
        tensor.requires_grad_()
    chunk_tokens, tile_vocab = 32, 256
    allowed = max(chunk_tokens * tile_vocab, case.head_VD.numel(), 512 * 2 * 10)
    with LargestTensor() as watched:
        selected = kernel_selected(case, own_top_k=4, chunk_tokens=chunk_tokens, tile_vocab=tile_vocab)
        (selected.logprobs_NM.sum() + selected.tail_logprobs_NS.sum()).backward()
    assert watched.num_elements <= allowed
    assert allowed * 100 < 512 * 4096


def test_cuda_bfloat16_products_come_out_in_float32():
    # No GPU is needed: meta tensors run the code of that path and check shapes, dtypes and signatures.
    inputs = Inputs(
        *(torch.empty(*size, device="meta", dtype=torch.bfloat16) for size in ((6, 8), (40, 8), (40,)))
    )
    ids_NU = torch.zeros(6, 3, device="meta", dtype=torch.int64)
    walk = Walk(None, 1.0, 4, 16, dtype=torch.float32, operand_dtype=torch.bfloat16)
    sums = vocabulary_sums(inputs, ids_NU, walk, own_top_k=2)
    assert {sums.max_N.dtype, sums.requested_NU.dtype} == {torch.float32}
    gradient = LogitGradient(sums.max_N, sums.sum_N, sums.requested_NU)
    gradients = propagate(inputs, ids_NU, walk, gradient, (True, True, True))
    assert [grad.dtype for grad in gradients] == [torch.bfloat16] * 3
    assert [grad.shape for grad in gradients] == [tensor.shape for tensor in inputs]


@pytest.mark.parametrize("bad_id", [37, -2])
def test_an_id_outside_the_vocabulary_is_named_with_its_position(bad_id):
    case = make_case(seed=16)
    case.ids_NM[7, 3] = bad_id
    with pytest.raises(ValueError, match=rf"ids\[7, 3\] is {bad_id}, outside the vocabulary of 37"):
        kernel_selected(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(13, 9)}, "hidden"),
        ({"head_VD": torch.zeros(0, 8)}, "no vocabulary"),
        ({"ids_NM": torch.zeros(12, 5, dtype=torch.int64)}, "ids must be int64"),
        ({"ids_NM": torch.zeros(13, 5, dtype=torch.int32)}, "ids must be int64"),
        ({"member_NSM": torch.zeros(13, 2, 4, dtype=torch.bool)}, "member must be bool"),
        ({"member_NSM": torch.zeros(13, 2, 5)}, "member must be bool"),
        ({"bias_V": torch.zeros(36)}, "bias"),
        ({"softcap": 0.0}, "softcap"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernel_selected(make_case()._replace(**change))


@pytest.mark.parametrize(
    "sizes", [{"own_top_k": 38}, {"own_top_k": -1}, {"chunk_tokens": 0}, {"tile_vocab": 0}]
)
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        kernel_selected(make_case(), **sizes)
