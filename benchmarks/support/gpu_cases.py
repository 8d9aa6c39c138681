"""What `benchmarks/gpu.py` measures, one function for each kind of case; run in processes of their own."""

# N = positions, D = hidden size, V = vocabulary, M = ids requested per position

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.workers import peak_mib
from torch import Tensor

GIB = 2**30
CHUNK = 2048
"""Positions of a chunk of the chunked cross-entropy."""


class Sizes(NamedTuple):
    """How large the cases are."""

    device: str
    vocabulary: int
    kernel_shapes: list[list[int]]
    step_model: dict[str, int]
    step_rollouts: int
    step_lengths: list[int]
    prompt_tokens: int
    micro_batch_tokens: int
    scoring_model: dict[str, int]
    scoring_sequences: int
    large_model: dict[str, int]
    large_tokens: int
    rounds: int

    @classmethod
    def full(cls, device: str) -> Sizes:
        """Shapes of Qwen3: 0.6B for a step, 1.7B for scoring, 8B for memory."""
        return cls(
            device=device,
            vocabulary=151_936,
            kernel_shapes=[[8192, 1024], [8192, 4096], [32768, 1024]],
            step_model=_qwen3(1024, 3072, 28, 16),
            step_rollouts=32,
            step_lengths=[256, 2000],
            prompt_tokens=64,
            micro_batch_tokens=16_384,
            scoring_model=_qwen3(2048, 6144, 28, 16),
            scoring_sequences=64,
            large_model=_qwen3(4096, 12_288, 36, 32),
            large_tokens=4096,
            rounds=5,
        )

    @classmethod
    def tiny(cls, device: str) -> Sizes:
        """So small that every case runs in seconds, and its figures say nothing."""
        tiny = _qwen3(32, 64, 2, 2) | {"head_dim": 16, "num_key_value_heads": 2}
        return cls(device, 512, [[64, 32]], tiny, 4, [8, 16], 4, 128, tiny, 4, tiny, 64, 2)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }


def make_model(sizes: Sizes, shape: dict[str, int], dtype: torch.dtype, *, tied: bool = True) -> Any:
    """A Qwen3 with random weights, made on the device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=sizes.vocabulary, tie_word_embeddings=tied, **shape)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(sizes.device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def timed(run: Callable[[], None], sizes: Sizes) -> dict[str, float]:
    """Median seconds, those of the first run, and by how many MiB the peak grew."""
    is_cuda = sizes.device == "cuda"
    seconds = []
    before = 0
    for index in range(sizes.rounds + 1):
        if is_cuda and index == 1:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    grown = torch.cuda.max_memory_allocated() - before if is_cuda else 0
    return {"s": statistics.median(seconds[1:]), "first_s": seconds[0], "mib": max(grown / 2**20, 1e-9)}


def measure_kernel(sizes: Sizes, contender: str, shape: list[int]) -> dict[str, float]:
    """Forward and backward of the loss of one id a position, or of 65 with their tail."""
    num_positions, hidden_size, num_ids = shape
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": sizes.device, "dtype": dtype}
    hidden_ND = torch.randn(num_positions, hidden_size, **options).requires_grad_()
    head_VD = (torch.randn(sizes.vocabulary, hidden_size, **options) / hidden_size**0.5).requires_grad_()
    ids_NM = torch.randint(0, sizes.vocabulary, (num_positions, num_ids), device=sizes.device)
    loss = LOSSES[contender]

    def run() -> None:
        hidden_ND.grad = head_VD.grad = None
        loss(hidden_ND, head_VD, ids_NM).backward()

    found = timed(run, sizes)
    return {"ms": found["s"] * 1e3, "mib": found["mib"]}


def our_loss(hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor) -> Tensor:
    from lightopd.kernels.selected_logprobs import selected_logprobs

    num_positions, num_ids = ids_NM.shape
    if num_ids == 1:
        return -selected_logprobs(hidden_ND, head_VD, ids_NM).logprobs_NM.sum()
    member = torch.ones(num_positions, 1, num_ids, dtype=torch.bool, device=ids_NM.device)
    selected = selected_logprobs(hidden_ND, head_VD, ids_NM, member_NSM=member)
    return -selected.logprobs_NM.sum() - selected.tail_logprobs_NS.sum()


def liger_loss(hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head_VD, hidden_ND, ids_NM[:, 0])
    return loss


def cce_loss(hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden_ND, head_VD, ids_NM[:, 0], reduction="sum")
    return loss


def chunked_loss(hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    def of_chunk(hidden_CD: Tensor, ids_C: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((hidden_CD @ head_VD.T).float(), ids_C, reduction="sum")

    chunks = zip(hidden_ND.split(CHUNK), ids_NM[:, 0].split(CHUNK), strict=True)
    return torch.stack([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def dense_loss(hidden_ND: Tensor, head_VD: Tensor, ids_NM: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden_ND @ head_VD.T).float(), ids_NM[:, 0], reduction="sum")


LOSSES = {
    "ours": our_loss,
    "liger": liger_loss,
    "cce": cce_loss,
    "chunked": chunked_loss,
    "dense": dense_loss,
}


def measure_step(sizes: Sizes, contender: str, path: str) -> dict[str, Any]:
    """An optimiser step in mixed precision: forward and backward of its micro-batches, clipping, AdamW."""
    from lightopd.schemas.finetune import OptimizerConfig
    from lightopd.training.optimizer import clip_gradients, make_optimizer
    from lightopd.training.student.compile import compile_layers
    from lightopd.training.student.training_mode import prepare_student

    objective, micro_batches = _step_data(sizes, contender, Path(path))
    student = prepare_student(
        make_model(sizes, sizes.step_model, torch.float32), gradient_checkpointing=False
    )
    if contender == "compiled":
        compile_layers(student)
    optimizer = make_optimizer(student, OptimizerConfig(lr=1e-6))

    def run() -> None:
        for rows in micro_batches:
            with torch.autocast(sizes.device, dtype=torch.bfloat16):
                loss = _step_loss(student, objective, rows, contender, sizes.device)
            loss.backward()
        clip_gradients(student, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    tokens = sum(int(rows.prompts_R.sum() + rows.responses_R.sum()) for rows in micro_batches)
    responses = sum(len(rows.response_ids_N) for rows in micro_batches)
    head = sizes.vocabulary * sizes.step_model["hidden_size"]
    body = sum(each.numel() for each in student.parameters()) - head
    card = torch.cuda.get_device_name() if sizes.device == "cuda" else "CPU"
    return {**timed(run, sizes), "flops": 6 * body * tokens + 6 * head * responses, "card": card}


def _step_data(sizes: Sizes, contender: str, path: Path) -> tuple[Any, list[Any]]:
    from support.synthetic_cache import open_data

    from lightopd.schemas.finetune import FinetuneConfig
    from lightopd.schemas.objectives.objective import ObjectiveConfig
    from lightopd.training.data.batches import StepDataset
    from lightopd.training.data.plan import make_plan

    target = {"target": {"kind": "divergence"}} if contender == "top64" else {}
    objective = ObjectiveConfig.model_validate(target)
    finetune = FinetuneConfig(
        batch_sequences=sizes.step_rollouts,
        micro_batch_tokens=sizes.micro_batch_tokens,
        layout="packed" if contender == "packed" else "padded",
    )
    store, index = open_data(path, objective)
    rows = StepDataset(make_plan(index, finetune, 0, 1), store)[0]
    assert isinstance(rows, list), rows
    return objective, rows


def _step_loss(student: Any, objective: Any, rows: Any, contender: str, device: str) -> Tensor:
    from lightopd.objectives.loss import compute_loss
    from lightopd.objectives.requirements import needs
    from lightopd.training.data.batches import collate
    from lightopd.training.student.forward import student_tokens

    batch = collate(rows, torch.device(device))
    if not contender.startswith("sft_"):
        tokens = student_tokens(student, batch, needs(objective).supports)
        return compute_loss(objective, batch.rollouts, tokens).value
    hidden_BTD = student.model(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.positions_N).to(torch.bfloat16)
    head_VD = student.lm_head.weight.to(torch.bfloat16)
    loss = LOSSES[contender.removeprefix("sft_")](hidden_ND, head_VD, batch.rollouts.ids_N[:, None])
    return loss / batch.rollouts.totals.num_tokens


@torch.inference_mode()
def measure_scoring(sizes: Sizes, contender: str) -> dict[str, float]:
    """Response tokens a second over sequences of mixed lengths."""
    import numpy as np

    from lightopd.engines.hf.score import ScoreSettings, score
    from lightopd.models.head import head_of
    from lightopd.models.load import LoadedModel
    from lightopd.schemas.records import Sequence

    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    model = make_model(sizes, sizes.scoring_model, dtype).eval()
    loaded = LoadedModel(model, head_of(model), torch.device(sizes.device), 40_960)
    numbers = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return numbers.integers(1, sizes.vocabulary, count).astype(np.int32)

    lengths = np.linspace(*sizes.step_lengths, sizes.scoring_sequences).astype(int)
    sequences = [Sequence(ids(sizes.prompt_tokens), ids(int(length))) for length in lengths]
    settings = ScoreSettings(64, 0.0, sizes.micro_batch_tokens, False)

    def run() -> None:
        if contender == "ours":
            score(loaded, sequences, settings)
        else:
            _bare_pass(loaded, sequences, sizes.micro_batch_tokens)

    return {"tokens_per_s": float(lengths.sum()) / timed(run, sizes)["s"]}


def _bare_pass(loaded: Any, sequences: Any, batch_tokens: int) -> None:
    from lightopd.engines.hf.batching import plan_batches
    from lightopd.engines.hf.head_scores import logit_slices
    from lightopd.engines.hf.hidden_states import num_inputs, plain_hidden

    for places in plan_batches([num_inputs(one) for one in sequences], batch_tokens):
        for _ in logit_slices(loaded.head, plain_hidden(loaded, [sequences[place] for place in places])):
            pass


def measure_large(sizes: Sizes) -> dict[str, Any]:
    """Peak memory of full fine-tuning with the fewest bytes: two steps of one rollout.

    On a CPU the peak is that of the whole process, which says nothing.
    """
    from lightopd.schemas.finetune import FinetuneConfig
    from lightopd.training.optimizer import clip_gradients, make_optimizer
    from lightopd.training.student.memory import estimate_memory
    from lightopd.training.student.training_mode import prepare_student

    finetune = FinetuneConfig(
        precision="bf16-true", gradient_checkpointing=True, micro_batch_tokens=sizes.large_tokens
    )
    model = make_model(sizes, sizes.large_model, torch.bfloat16, tied=False)
    estimate = estimate_memory(model, finetune, sizes.large_tokens)
    student = prepare_student(model, gradient_checkpointing=True)
    optimizer = make_optimizer(student, finetune.optimizer, low_memory=True)
    ids_BT = torch.randint(0, sizes.vocabulary, (1, sizes.large_tokens), device=sizes.device)

    def run() -> None:
        hidden_ND = student.model(input_ids=ids_BT, use_cache=False).last_hidden_state[0, :-1]
        our_loss(hidden_ND, student.lm_head.weight, ids_BT[0, 1:, None]).backward()
        clip_gradients(student, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    is_cuda = sizes.device == "cuda"
    # torchao compiles its step, which on a CPU takes a minute and is of no interest here.
    with nullcontext() if is_cuda else torch.compiler.set_stance("force_eager"):
        found = timed(run, sizes._replace(rounds=1))
    peak = torch.cuda.max_memory_allocated() if is_cuda else int(peak_mib() * 2**20)
    split = {name: round(size / GIB, 2) for name, size in asdict(estimate).items()}
    return {
        "peak_gib": peak / GIB,
        "estimate_gib": estimate.total / GIB,
        "split": split,
        "s": found["s"],
    }


CASES: dict[str, Callable[..., Any]] = {
    "kernel": measure_kernel,
    "step": measure_step,
    "scoring": measure_scoring,
    "large": measure_large,
}
