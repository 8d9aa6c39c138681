"""What the memory of a run goes to, worked out before its first step without using any."""

# B = rows of a micro-batch, T = their length, P = parameters, D = hidden size, V = vocabulary

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightopd.kernels.selected_logprobs import CUDA_TILE
from lightopd.schemas.finetune import FinetuneConfig

GIB = 2**30
MOMENT_BYTES = {"32-true": 8, "bf16-mixed": 8, "bf16-true": 2}
"""Of both moments of one parameter; those of 8 bits have scales of 4 bytes for 256, which is left out."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device that holds the whole student, at the peak of a step."""

    weights: int
    gradients: int
    moments: int
    activations: int
    """What autograd keeps of the largest micro-batch, and one layer more where layers are recomputed."""
    kernel: int
    """Around the output layer: gradients before they are added up, the cast head, and one tile."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def sentence(self, available: int) -> str:
        """For people: what memory goes to, and whether it fits."""
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.1f}" for field in fields(self))
        verdict = "fits" if self.total <= available else "does not fit"
        return (
            f"estimated memory: {self.total / GIB:.1f} GiB ({parts}), which {verdict} into "
            f"{available / GIB:.1f} GiB"
        )


def estimate_memory(student: PreTrainedModel, finetune: FinetuneConfig, longest: int) -> MemoryEstimate:
    """Weights, gradients and moments from their formats; activations from a run without memory.

    The decoder is run once over the largest micro-batch on tensors that have shapes and no storage, and what
    autograd would keep is added up; nothing is assumed about its layers.

    Args:
        student: as it is trained.
        finetune: of the run.
        longest: tokens of the longest rollout.
    """
    trained = [each for each in student.parameters() if each.requires_grad]
    weights = sum(each.nbytes for each in student.parameters())
    gradients = sum(each.nbytes for each in trained)
    moments = sum(each.numel() for each in trained) * MOMENT_BYTES[finetune.precision]
    shape = (max(1, finetune.micro_batch_tokens // longest), longest)
    activations = saved_bytes(student, finetune, shape, recompute=finetune.gradient_checkpointing)
    if finetune.gradient_checkpointing:
        num_layers = student.config.get_text_config(decoder=True).num_hidden_layers
        activations += saved_bytes(student, finetune, shape, recompute=False) // num_layers
    return MemoryEstimate(weights, gradients, moments, activations, _kernel(student, finetune, shape))


def saved_bytes(
    student: PreTrainedModel, finetune: FinetuneConfig, shape: tuple[int, int], *, recompute: bool
) -> int:
    """What autograd keeps of the decoder's forward pass over int64 [B, T], weights left out."""
    dtype = torch.bfloat16 if finetune.precision == "bf16-true" else torch.float32
    with FakeTensorMode():
        copy = AutoModelForCausalLM.from_config(student.config, dtype=dtype).train()
        if recompute:
            copy.gradient_checkpointing_enable({"use_reentrant": False})
        ids_BT = torch.zeros(shape, dtype=torch.int64)
        return measure_saved(copy, ids_BT, is_mixed=finetune.precision == "bf16-mixed")


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
    head = num_vocab * hidden_size * (4 if finetune.precision == "bf16-mixed" else head_VD.element_size())
    return int(hidden + head + 4 * tile * (chunk + hidden_size))
