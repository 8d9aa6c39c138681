"""What the memory of a run goes to, worked out before its first step without using any."""

# B = rows of a micro-batch, T = their length, P = parameters, D = hidden size, V = vocabulary

import functools
import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from lightopd.kernels.selected_logprobs import CUDA_TILE
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.data.sizes import NOTHING, CachedSizes
from lightopd.training.distributed.strategies import FSDP, uses_gpu

log = logging.getLogger(__name__)

GIB = 2**30
MOMENT_BYTES = {"32-true": 8, "bf16-mixed": 8, "bf16-true": 2}
"""Of both moments of one parameter; those of 8 bits have scales of 4 bytes for 256, which is left out."""

POSITION_BYTES = 64
"""Of a response token, support left out: ids, places, masks, log-probabilities and their gradients."""
ENTRY_BYTES = 28
"""Of an entry of a support: its id twice, the cached log-probability, the student's and its gradient."""
HIDDEN_BYTES = 6
"""Of a number in a hidden state: as it is stored, at most 2, and in float32."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a device."""

    place: str
    """For people."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a step."""

    weights: int
    """And their moving average, where there is one."""
    gradients: int
    moments: int
    activations: int | None
    """What autograd keeps of the largest micro-batch, and one layer more where layers are recomputed; None
    where the student cannot be run without memory."""
    kernel: int
    """Around the output layer: gradients before they are added up, the cast head, and one tile."""
    cache: int
    """The cached columns of the largest micro-batch, what the student says on the same ids, and heads."""

    @property
    def total(self) -> int:
        """All that is known."""
        return sum(getattr(self, field.name) or 0 for field in fields(self))

    def fits(self, available: Memory) -> bool:
        """Whether there is so much."""
        return self.total <= available.size_bytes

    def sentence(self, available: Memory) -> str:
        """For people: what memory goes to, and whether it fits."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
        verdict = "fits" if self.fits(available) else "does not fit"
        least = "at least " if self.activations is None else ""
        return (
            f"estimated memory: {least}{_gib(self.total)} GiB ({parts}), which {verdict} into the "
            f"{_gib(available.size_bytes)} GiB of {available.place}"
        )


def available_memory(finetune: FinetuneConfig) -> Memory | None:
    """What a run can use here: the first GPU, or what is free of the machine's memory; None if not known."""
    if uses_gpu(finetune):
        return Memory("the GPU", torch.cuda.get_device_properties(0).total_memory)
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return Memory("free memory", int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        return None


def estimate_memory(
    student: PreTrainedModel, finetune: FinetuneConfig, longest: int, cached: CachedSizes = NOTHING
) -> MemoryEstimate:
    """Weights, gradients and moments from their formats; activations from a run without memory.

    The decoder is run once over the largest micro-batch on tensors that have shapes and no storage, and what
    autograd would keep is added up; nothing is assumed about its layers. Under `fsdp` a device has its share
    of weights, gradients and moments.

    Args:
        student: its parameters say how many numbers there are and which are trained; they may lie on `meta`.
        finetune: of the run.
        longest: tokens of the longest rollout.
        cached: what is read of the cache.
    """
    size = 2 if finetune.precision == "bf16-true" else 4
    trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
    copies = size * sum(each.numel() for each in student.parameters())
    average = 4 * trained if finetune.ema_decay is not None else 0
    shares = finetune.devices * finetune.nodes if finetune.strategy == FSDP else 1
    rows = max(1, finetune.micro_batch_tokens // longest)
    return MemoryEstimate(
        weights=(copies + average) // shares,
        gradients=size * trained // shares,
        moments=MOMENT_BYTES[finetune.precision] * trained // shares,
        activations=_activations(student, finetune, (rows, longest)),
        kernel=_kernel(student, finetune, (rows, longest)),
        cache=cached.heads
        + rows * longest * (POSITION_BYTES + ENTRY_BYTES * cached.entries + HIDDEN_BYTES * cached.hidden),
    )


def _activations(student: PreTrainedModel, finetune: FinetuneConfig, shape: tuple[int, int]) -> int | None:
    recompute = finetune.gradient_checkpointing
    try:
        kept = saved_bytes(student, finetune, shape, recompute=recompute)
        if recompute:
            num_layers = student.config.get_text_config(decoder=True).num_hidden_layers
            kept += saved_bytes(student, finetune, shape, recompute=False) // num_layers
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        # Its code looks at values, which such tensors do not have. The run itself needs no estimate.
        log.debug("activations are not estimated: %s", error)
        return None
    return kept


def saved_bytes(
    student: PreTrainedModel, finetune: FinetuneConfig, shape: tuple[int, int], *, recompute: bool
) -> int:
    """What autograd keeps of the decoder's forward pass over int64 [B, T], weights left out."""
    config = student.config
    kind: Any = type(student.get_base_model() if hasattr(student, "get_base_model") else student)
    described = config.to_json_string(use_diff=False), config._attn_implementation
    return _saved_bytes(kind, *described, finetune.precision, shape, recompute)


@functools.lru_cache(maxsize=32)
def _saved_bytes(
    kind: type[PreTrainedModel],
    config: str,
    attention: str | None,
    precision: str,
    shape: tuple[int, int],
    recompute: bool,
) -> int:
    """As above; rounds ask it of one model again and again."""
    described = kind.config_class.from_dict(json.loads(config))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with FakeTensorMode():
        copy = kind._from_config(described, dtype=dtype, attn_implementation=attention).train()
        if recompute:
            copy.gradient_checkpointing_enable({"use_reentrant": False})
        ids_BT = torch.zeros(shape, dtype=torch.int64)
        return measure_saved(copy, ids_BT, is_mixed=precision == "bf16-mixed")


def measure_saved(model: PreTrainedModel, ids_BT: Tensor, *, is_mixed: bool) -> int:
    """Bytes of distinct tensors that autograd keeps of the decoder's forward pass, weights left out."""
    own = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, object]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        model.get_decoder()(input_ids=ids_BT, use_cache=False)
    return sum(size for size, _ in kept.values())


def _kernel(student: PreTrainedModel, finetune: FinetuneConfig, shape: tuple[int, int]) -> int:
    head_VD = student.get_output_embeddings().weight
    num_vocab, hidden_size = head_VD.shape
    chunk, tile = CUDA_TILE
    # Gradients by hidden states are summed in float32; those by the head come in its own or the cast format.
    hidden = 4 * shape[0] * shape[1] * hidden_size
    head = num_vocab * hidden_size * (2 if finetune.precision == "bf16-true" else 4)
    return int(hidden + head + 4 * tile * (chunk + hidden_size))


def _gib(size: int | None) -> str:
    """One digit after the point, and as many as say something of a small model."""
    if size is None:
        return "unknown"
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.2g}"
