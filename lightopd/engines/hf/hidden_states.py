"""Hidden states that predict responses, from one forward pass over whole sequences.

Sequences are padded on the right. A causal model then needs no mask and no positions, and attention takes
its fastest path. The last token of a sequence predicts nothing that is asked for, so it is not run.

T = positions, N = response positions of all sequences laid end to end, D = hidden size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightopd.models.causal_attention import brings_masks, causal_mask
from lightopd.models.head import last_hidden
from lightopd.models.load import LoadedModel
from lightopd.schemas import records
from lightopd.schemas.records import Ids


def plain_hidden(loaded: LoadedModel, sequences: Sequence[records.Sequence]) -> Tensor:
    """Hidden states [N, D] of the positions that predict response tokens, sequence after sequence."""
    rows = [np.concatenate([sequence.prompt_ids, sequence.response_ids[:-1]]) for sequence in sequences]
    input_ids_BT = to_device(pad_right(rows), loaded.device)
    masks = {"attention_mask": causal_mask(loaded.device)} if brings_masks(loaded.model) else {}
    hidden_BTD = last_hidden(loaded.model, input_ids=input_ids_BT, use_cache=False, **masks)
    starts = [len(sequence.prompt_ids) - 1 for sequence in sequences]
    return gather_spans(hidden_BTD, starts, [len(sequence.response_ids) for sequence in sequences])


def num_inputs(sequence: records.Sequence) -> int:
    """Tokens of a sequence that go through the model: all but the last."""
    return len(sequence.prompt_ids) + len(sequence.response_ids) - 1


def pad_right(rows: Sequence[Ids]) -> NDArray[np.int64]:
    """Rows as one int64 array, zeros at the end of shorter ones."""
    padded_BT = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in enumerate(rows):
        padded_BT[row, : len(ids)] = ids
    return padded_BT


def gather_spans(hidden_BTD: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Hidden states [N, D] of `lengths[b]` positions from `starts[b]` on, row after row."""
    width = hidden_BTD.shape[1]
    places = [
        row * width + start + np.arange(length)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return hidden_BTD.flatten(0, 1)[to_device(np.concatenate(places), hidden_BTD.device)]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """On the device. A GPU takes it from pinned memory and is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
