"""Causal attention without a [T, T] mask or a wait for the device: how students are trained on a GPU.

Transformers makes the masks of a pass from its positions, which it reads on the host, and gives rows that
several sequences share a mask of [T, T], which keeps PyTorch's flash and cuDNN kernels away. Under the name
`ATTENTION` a pass brings one of two masks of its own, which transformers hands on:

- `causal_mask`: one number that means "every earlier token"; PyTorch's fused attention, told `is_causal`.
- `packed_mask`: which blocks of 128 by 128 tokens matter; flex attention, which PyTorch compiles.

A pass without one of them (generation, a batch that is padded on the left) is `sdpa`, mask and all.
"""

# B = rows, T = their length, H = heads, D = hidden size

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightopd.models.head import last_hidden
from lightopd.models.probe import probe_rows

ATTENTION = "lightopd_causal"
SHAPE = (1, 1, 1, 1)
"""Of `causal_mask`; to transformers it is a mask that was made before."""
TOLERANCE = 1e-4
"""Relative difference that rounding explains."""


def attend(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer by the mask of its pass; signature and results as transformers has them."""
    if isinstance(attention_mask, BlockMask):
        tensors = _in_one_format(query_BHTD, key_BHTD, value_BHTD)
        found: tuple[Tensor, Tensor | None] = flex_attention_forward(
            module, *tensors, attention_mask, **options
        )
        return found[0], None
    if attention_mask is not None and attention_mask.shape == SHAPE:
        attention_mask = None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **options
    )
    return result


def _in_one_format(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under mixed precision rotated queries and keys are float32, values are not; `sdpa` casts by itself."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
    return tensors


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def causal_mask(device: torch.device) -> Tensor:
    """The mask of rows with one sequence each, padded on the right."""
    return torch.ones(SHAPE, dtype=torch.bool, device=device)


def packed_mask(position_ids_BT: Tensor) -> BlockMask:
    """The mask of rows that sequences share; positions begin at 0 with each of them."""
    sequence_BT = (position_ids_BT == 0).cumsum(1)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (sequence_BT[row, query] == sequence_BT[row, key])

    num_rows, length = position_ids_BT.shape
    # Compiled, or else it would make [T, T] after all; on a CPU it is a matter of tests.
    options: dict[str, Any] = {"device": position_ids_BT.device, "_compile": position_ids_BT.is_cuda}
    return create_block_mask(sees, num_rows, None, length, length, **options)


def brings_masks(model: PreTrainedModel) -> bool:
    """Whether passes of training give the model one of these masks."""
    return bool(model.config._attn_implementation == ATTENTION)


@torch.no_grad()
def use_causal_attention(model: PreTrainedModel) -> bool:
    """Switch a model to `ATTENTION` where that is what it does now; says whether it is.

    It is not for other attention than `sdpa`, for layers that see a part of the context or are no attention,
    and where a trial gives other hidden states: code of a model's own may read masks in its own way.
    """
    if model.config._attn_implementation != "sdpa" or not _sees_everything(model):
        return False
    width = model.get_output_embeddings().weight.shape[0]
    rows = [torch.from_numpy(row).long()[None] for row in probe_rows(model, width)]
    rows = [row.to(next(model.parameters()).device) for row in rows]
    expected = [last_hidden(model, input_ids=row, use_cache=False) for row in rows]
    model.set_attn_implementation(ATTENTION)
    masks = {"attention_mask": causal_mask(rows[0].device)}
    found = [last_hidden(model, input_ids=row, use_cache=False, **masks) for row in rows]
    if all(_is_close(one, other) for one, other in zip(found, expected, strict=True)):
        return True
    model.set_attn_implementation("sdpa")
    return False


def _sees_everything(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return not getattr(config, "sliding_window", None)
    return set(kinds) == {"full_attention"}


def _is_close(found_BTD: Tensor, expected_BTD: Tensor) -> bool:
    difference = float((found_BTD - expected_BTD).abs().max())
    return difference <= TOLERANCE * max(1e-12, float(expected_BTD.abs().max()))
