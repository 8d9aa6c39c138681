"""Cases of the kernel, and a dense float64 reference of values and gradients."""

# N = positions, D = hidden size, V = vocabulary, M = ids requested per position, S = tail sets

from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightopd.kernels.fixed_sums import FixedSums
from lightopd.kernels.selected_logprobs import TokenLogprobs, selected_logprobs

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here; `make test-gpu` on a machine with one runs it"
)


class Case(NamedTuple):
    hidden_ND: Tensor
    head_VD: Tensor
    ids_NM: Tensor
    member_NSM: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0


class Outcome(NamedTuple):
    """Values in float64, then gradients of one fixed weighted sum of log-probabilities and tails."""

    logprobs_NM: Tensor
    tail_logprobs_NS: Tensor
    logsumexp_N: Tensor
    entropy_N: Tensor
    grad_hidden_ND: Tensor
    grad_head_VD: Tensor
    grad_bias_V: Tensor


def make_case(
    seed: int = 0,
    shape: tuple[int, int, int, int, int] = (13, 8, 37, 5, 2),
    dtype: torch.dtype = torch.float32,
    with_bias: bool = False,
    **options: Any,
) -> Case:
    """Ids repeat often (at most eight distinct ones a row) and about one in eight is padding."""
    num_positions, num_hidden, num_vocab, num_requested, num_sets = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    start_N1 = torch.randint(0, num_vocab, (num_positions, 1), generator=generator)
    ids_NM = torch.randint(0, 8, (num_positions, num_requested), generator=generator) + start_N1
    ids_NM = ids_NM.remainder(num_vocab)
    ids_NM[torch.rand(num_positions, num_requested, generator=generator) < 0.125] = -1
    member_NSM = torch.rand(num_positions, num_sets, num_requested, generator=generator) < 0.5
    bias_V = normal(num_vocab) if with_bias else None
    return Case(
        normal(num_positions, num_hidden) / 2,
        normal(num_vocab, num_hidden),
        ids_NM,
        member_NSM,
        bias_V,
        **options,
    )


def dense_logprobs(case: Case) -> tuple[Tensor, Tensor]:
    """Log-softmax over the whole vocabulary, and the logits it came from."""
    logits_NV = case.hidden_ND @ case.head_VD.T
    if case.bias_V is not None:
        logits_NV = logits_NV + case.bias_V
    if case.softcap is not None:
        logits_NV = case.softcap * torch.tanh(logits_NV / case.softcap)
    logits_NV = logits_NV / case.temperature
    return logits_NV.log_softmax(-1), logits_NV


def dense_selected(case: Case) -> TokenLogprobs:
    logprobs_NV, logits_NV = dense_logprobs(case)
    is_padding_NM = case.ids_NM < 0
    logprobs_NM = logprobs_NV.gather(1, case.ids_NM.clamp(min=0)).masked_fill(is_padding_NM, 0.0)
    in_set_NSV = torch.zeros(*case.member_NSM.shape[:2], logits_NV.shape[1], dtype=torch.bool)
    for n, s, m in case.member_NSM.nonzero().tolist():
        if case.ids_NM[n, m] >= 0:
            in_set_NSV[n, s, case.ids_NM[n, m]] = True
    tail_NS = logprobs_NV[:, None].expand(in_set_NSV.shape).masked_fill(in_set_NSV, -torch.inf).logsumexp(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return TokenLogprobs(logprobs_NM, tail_NS, logits_NV.logsumexp(-1), entropy_N, None, None)


def kernel_selected(case: Case, **sizes: int) -> TokenLogprobs:
    hidden_ND, head_VD, ids_NM, *options = case
    names = ("member_NSM", "bias_V", "softcap", "temperature")
    return ours(hidden_ND, head_VD, ids_NM, **dict(zip(names, options, strict=True)), **sizes)


class Path:
    """The path under test: torch's operations, or Triton's kernels; and the device they run on."""

    is_fused = False
    device = "cpu"


def ours(hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor, **options: Any) -> TokenLogprobs:
    """The kernel on the path under test, from and to tensors on the CPU."""
    there = {
        name: value.to(Path.device) if isinstance(value, Tensor) else value for name, value in options.items()
    }
    inputs = (each.to(Path.device) for each in (hidden_ND, head_VD, ids_NM))
    selected = selected_logprobs(*inputs, fused=Path.is_fused, **there)
    values = (getattr(selected, field.name) for field in fields(selected))
    return TokenLogprobs(*(_to_cpu(value) for value in values))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, FixedSums):
        return FixedSums(*(each.cpu() for each in value))
    return None if value is None else value.cpu()


def outcome(case: Case, compute: Any, **sizes: int) -> Outcome:
    """Run `compute` on fresh leaves and differentiate it with weights that depend on the shapes only."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.hidden_ND, case.head_VD)]
    bias_V = torch.zeros_like(leaves[1][:, 0]) if case.bias_V is None else case.bias_V.detach().clone()
    leaves.append(bias_V.requires_grad_())
    live = case._replace(hidden_ND=leaves[0], head_VD=leaves[1], bias_V=leaves[2])
    selected = compute(live, **sizes)
    generator = torch.Generator().manual_seed(99)
    loss = leaves[0].sum() * 0
    for value in (selected.logprobs_NM, selected.tail_logprobs_NS):
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        loss = loss + (value * weight.to(value.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    values = (selected.logprobs_NM, selected.tail_logprobs_NS, selected.logsumexp_N, selected.entropy_N)
    return Outcome(*(tensor.detach().double() for tensor in (*values, *grads)))


def reference(case: Case) -> Outcome:
    doubled = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case]
    return outcome(Case(*doubled), dense_selected)


def assert_agrees(ours: Outcome, wanted: Outcome, tolerance: float) -> None:
    """Every error is below the tolerance times the largest value of its tensor, or times 1 if more."""
    for name, found, expected in zip(Outcome._fields, ours, wanted, strict=True):
        assert found.shape == expected.shape, name
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(
            found, expected, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


class LargestTensor(TorchDispatchMode):
    """Watches every operation: the most elements in any result, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0
        self.num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # Triton's interpreter copies whole storages as bytes; no tensor of the kernel is of bytes.
        sizes = [tensor.numel() for tensor in tensors if tensor.dtype != torch.uint8]
        self.num_elements = max(self.num_elements, *sizes, 0)
        self.num_products += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return result
