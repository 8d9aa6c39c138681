"""Triton's kernels against torch's operations, in bfloat16, in memory, and before a GPU's compiler."""

import subprocess
import sys
import weakref
from pathlib import Path as File

import pytest
import torch
from kernel_cases import Path, assert_agrees, kernel_selected, make_case, outcome, reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightopd.kernels import plain_tiles
from lightopd.kernels.selected_logprobs import CUDA_TILE, FEW_POSITIONS
from lightopd.kernels.tile_types import Inputs, LogitGradient, Walk
from lightopd.kernels.vocabulary_walk import propagate, vocabulary_sums

pytest.importorskip("triton")
from lightopd.kernels import fused_tiles, triton_tiles

BFLOAT16 = Walk(None, 1.0, 8, 32, dtype=torch.float32, operand_dtype=torch.bfloat16, is_fused=True)


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(Path, "is_fused", True)


@pytest.fixture
def float32_products_of_bfloat16():
    """What a GPU's matrix product of bfloat16 factors gives, and a CPU has no operation for."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(
        "mm.dtype_out", lambda a, b, dtype, *, out: torch.mm(a.to(dtype), b.to(dtype), out=out), "CPU"
    )
    library.impl(
        "addmm.dtype_out",
        lambda sums, a, b, dtype, *, beta=1, alpha=1, out: torch.addmm(
            sums, a.to(dtype), b.to(dtype), out=out
        ),
        "CPU",
    )
    yield
    library._destroy()


@pytest.mark.parametrize("options", [{}, {"with_bias": True, "softcap": 2.0, "temperature": 1.7}])
def test_one_pass_gives_what_several_give(fused, options):
    case = make_case(seed=1, **options)
    assert_agrees(outcome(case, kernel_selected, chunk_tokens=9, tile_vocab=20), reference(case), 1e-6)


def test_a_row_longer_than_a_block_is_read_block_by_block(fused, monkeypatch):
    monkeypatch.setattr(fused_tiles, "BLOCK_TOKENS", 16)
    case = make_case(seed=2, softcap=3.0)
    assert_agrees(outcome(case, kernel_selected), reference(case), 1e-6)


def test_ids_that_are_every_token_of_a_tile_leave_nothing_to_sum(fused):
    case = make_case(shape=(3, 4, 9, 9, 1))
    ids_NM = torch.arange(9).flip(0).expand(3, 9)
    case = case._replace(ids_NM=ids_NM, member_NSM=torch.ones(3, 1, 9, dtype=torch.bool))
    selected = kernel_selected(case, tile_vocab=4)
    assert (selected.tail_logprobs_NS == -torch.inf).all()
    torch.testing.assert_close(selected.logprobs_NM.exp().sum(1), torch.ones(3))


def test_the_gradient_in_bfloat16_takes_the_place_of_the_products_it_is_made_from(monkeypatch):
    # Blocks of 16: every block but the first is written where earlier ones were read.
    monkeypatch.setattr(fused_tiles, "BLOCK_TOKENS", 16)
    generator = torch.Generator().manual_seed(0)
    products_CT = torch.randn(5, 70, generator=generator)
    part = LogitGradient(
        products_CT.amax(1), torch.randn(5, generator=generator), torch.randn(5, 3, generator=generator)
    )
    ids_CU = torch.tensor([[100, 169, -1]]).repeat(5, 1)
    wanted = plain_tiles.turn_into_gradient(products_CT.clone(), part, ids_CU, 100, BFLOAT16)
    found = fused_tiles.turn_into_gradient(products_CT, None, part, ids_CU, 100, BFLOAT16)
    assert (found.dtype, found.data_ptr()) == (torch.bfloat16, products_CT.data_ptr())
    # The interpreter cuts digits off where a GPU rounds to the nearest.
    torch.testing.assert_close(found.float(), wanted, rtol=2.0**-7, atol=1e-7)


def test_bfloat16_factors_give_values_to_2e_5_nats_and_gradients_to_half_precision(
    float32_products_of_bfloat16,
):
    case = make_case(seed=3, shape=(20, 32, 90, 4, 1), dtype=torch.bfloat16)
    inputs, wanted = Inputs(case.hidden_ND, case.head_VD, None), reference(case)
    ids_NU = case.ids_NM[:, :1].contiguous()
    sums = vocabulary_sums(inputs, ids_NU, BFLOAT16, 0)
    dense_NV = case.hidden_ND.double() @ case.head_VD.double().T
    everything_NV = torch.cat([sums.max_N[:, None] + sums.sum_N.log()[:, None], sums.requested_NU], 1)
    assert (everything_NV.logsumexp(1).double() - dense_NV.logsumexp(1)).abs().max() < 2e-5
    assert (wanted.logsumexp_N - dense_NV.logsumexp(1)).abs().max() < 1e-9
    scale_N = -1 / sums.sum_N
    gradient = LogitGradient(sums.max_N, scale_N, torch.zeros_like(sums.requested_NU))
    found = propagate(inputs, ids_NU, BFLOAT16, gradient, (True, True, False))
    others_NV = dense_NV.scatter(1, ids_NU.clamp(min=0), -torch.inf).where(ids_NU >= 0, dense_NV).softmax(1)
    for ours, exact in (
        (found.hidden_ND, -others_NV @ case.head_VD.double()),
        (found.weight_VD, -others_NV.T @ case.hidden_ND.double()),
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 6e-3 * exact.norm()


COMPILE = """
import itertools, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightopd.kernels import triton_tiles

floats, ids = "*fp32", "*i64"
numbers = dict.fromkeys(("num_rows", "start", "width", "num_requested", "gradient_stride"), "i32")
numbers |= dict(softcap="fp32", temperature="fp32", ids=ids)
tensors = ("logits", "requested", "running_max", "running_sum", "running_moment", "row_max", "row_scale")
numbers |= dict.fromkeys(tensors, floats)
for half, shaped, slots in itertools.product(("fp32", "bf16"), (False, True), (0, 1, 128)):
    fixed = dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "HAS_TEMPERATURE"), shaped)
    fixed |= dict(ROWS=1, BLOCK_T=4096, BLOCK_U=slots)
    for kernel in (triton_tiles.absorb_rows, triton_tiles.gradient_rows):
        types = numbers | dict.fromkeys(("bias", "gradient"), "*" + half) | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"], kernel
        ptx = compiled.asm["ptx"]
        assert ".local" not in ptx, "registers do not suffice"
        writes_half = half == "bf16" and kernel is triton_tiles.gradient_rows
        assert not writes_half or "cvt.rn.bf16" in ptx, "not rounded to the nearest"
        print(kernel.__name__, half, shaped, slots)
"""


@pytest.mark.slow
def test_the_compiler_of_a_hopper_gpu_takes_every_kernel():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(File.home())},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 24


class NoKernel:
    """Takes a launch and does nothing: a GPU's shapes are run on tensors without memory."""

    def __getitem__(self, grid):
        return lambda *tensors, **options: None


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.dtype_out:
            return kwargs["out"]  # a GPU adds in place, where tensors without memory get a sum of two
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (key := leaf.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = leaf.untyped_storage().nbytes()
                self.live += self.sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(leaf.untyped_storage(), self._free, key)
        return result

    def _free(self, key):
        self.live -= self.sizes.pop(key)


@pytest.mark.parametrize(
    ("num_positions", "num_hidden", "allowed_mib"),
    [(8192, 1024, 331 * 1.1), (8192, 4096, 1326 * 1.1), (32768, 1024, 436 * 1.1)],
)
@pytest.mark.parametrize("num_requested", [1, 65])
def test_memory_on_a_gpu_is_the_gradients_and_one_tile(
    num_positions, num_hidden, allowed_mib, num_requested, monkeypatch
):
    # 1.1 times what Liger 0.8.5 took on an H100; of the head's own gradient alone 297 and 1187 MiB.
    for name in ("absorb_rows", "gradient_rows"):
        monkeypatch.setattr(triton_tiles, name, NoKernel())
    num_vocab, chunk = 151_936, 1024 if num_positions <= FEW_POSITIONS else CUDA_TILE[0]
    walk = BFLOAT16._replace(chunk_tokens=chunk, tile_vocab=CUDA_TILE[1])

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    inputs = Inputs(empty(num_positions, num_hidden), empty(num_vocab, num_hidden), None)
    ids_NU = empty(num_positions, num_requested, dtype=torch.int64)
    with LiveBytes() as watched:
        given = sum(each.nbytes for each in (inputs.hidden_ND, inputs.weight_VD, ids_NU))
        sums = vocabulary_sums(inputs, ids_NU, walk, 0)
        gradient = LogitGradient(sums.max_N, sums.sum_N, sums.requested_NU)
        propagate(inputs, ids_NU, walk, gradient, (True, True, False))
    requested_bytes = 4 * num_positions * num_requested
    assert (watched.peak - given - requested_bytes) / 2**20 <= allowed_mib
