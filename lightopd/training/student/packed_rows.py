"""Several rollouts in one row: what the decoder is given, and whether it keeps them apart."""

# B = rows, T = their length, D = hidden size

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from lightopd.errors import TrainingError
from lightopd.models.causal_attention import brings_masks, causal_mask, packed_mask
from lightopd.models.head import last_hidden
from lightopd.training.data.batches import Microbatch

PROBE_TOKENS = 6
"""Tokens of each of the two sequences that a model is tried on."""
PROBE_TOLERANCE = 1e-4
"""Relative difference that rounding explains; what leaks from one sequence into the next is far larger."""


def decoder_inputs(student: PreTrainedModel, batch: Microbatch) -> dict[str, Any]:
    """Arguments of the decoder for a micro-batch.

    Rows are padded on the right and attention is causal: no response position can see padding, so no mask is
    needed, and without one the fastest attention kernels apply. Where rollouts share rows transformers makes
    the mask from the positions, which begin again with each rollout. A student that takes masks from here
    (`causal_attention`) is given one that is smaller than [T, T].
    """
    ids_BT, positions_BT = batch.input_ids_BT, batch.position_ids_BT
    if brings_masks(student):
        if positions_BT is None:
            return {"input_ids": ids_BT, "attention_mask": causal_mask(ids_BT.device)}
        masks = {"attention_mask": packed_mask(positions_BT)}
        return {"input_ids": ids_BT, "position_ids": positions_BT, **masks}
    if positions_BT is None:
        return {"input_ids": ids_BT}
    inputs = {"input_ids": ids_BT, "position_ids": positions_BT}
    if (student.config._attn_implementation or "").startswith("flash"):
        # These kernels keep sequences apart only in a batch of one row.
        return {name: ids_BT.reshape(1, -1) for name, ids_BT in inputs.items()}
    return inputs


@torch.no_grad()
def check_packing(student: PreTrainedModel) -> None:
    """Compare two short sequences in one row with each on its own.

    Raises:
        TrainingError: the second sees the first, or its positions do not begin again.
    """
    if "position_ids" not in inspect.signature(student.get_decoder().forward).parameters:
        raise TrainingError(_refusal(student, "its decoder takes no positions"))
    device = next(student.parameters()).device
    width = student.get_output_embeddings().weight.shape[0]
    ids_BT = (torch.arange(2 * PROBE_TOKENS, device=device) * 7919 + 1).remainder(width)[None]
    position_ids_BT = torch.arange(PROBE_TOKENS, device=device).repeat(2)[None]
    together_TD = last_hidden(student, input_ids=ids_BT, position_ids=position_ids_BT, use_cache=False)[0]
    alone_TD = last_hidden(student, input_ids=ids_BT.view(2, -1), use_cache=False).flatten(0, 1)
    difference = float((together_TD - alone_TD).abs().max() / alone_TD.abs().max())
    if not difference <= PROBE_TOLERANCE:
        raise TrainingError(_refusal(student, f"hidden states differ by {difference:.2g} of the largest"))


def _refusal(student: PreTrainedModel, found: str) -> str:
    return (
        f"{type(student).__name__} does not keep rollouts apart that share a row ({found}); "
        "set layout to padded"
    )
