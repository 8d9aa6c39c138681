"""Runs a prompt once for all responses to it: its keys and values are shared by their rows.

Prompts are padded on the right and run without a mask; a response's rows then mask the padding between prompt
and response and count positions from the prompt's own length. That holds for plain attention over the whole
context only, so a model is tried on a few tokens first.

U = distinct prompts, B = response rows, T = positions, P = padded prompt length, N = response positions,
D = hidden size.
"""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightopd.engines.hf.batching import plan_batches
from lightopd.engines.hf.hidden_states import gather_spans, pad_right, plain_hidden, to_device
from lightopd.models.head import last_hidden
from lightopd.models.load import LoadedModel
from lightopd.schemas import records
from lightopd.schemas.records import Ids

log = logging.getLogger(__name__)

MIN_SAVED_SHARE = 0.2
"""Share of a group's tokens that has to be saved; on a CPU, mask and cache cost about half of that."""

Group = list[int]
"""Indices of sequences with one prompt."""


def worthwhile_groups(
    sequences: Sequence[records.Sequence], indices: Sequence[int]
) -> tuple[list[Group], list[int]]:
    """The groups whose prompt is worth sharing, and the indices of all other sequences."""
    by_prompt: dict[bytes, Group] = {}
    for index in indices:
        by_prompt.setdefault(sequences[index].prompt_ids.tobytes(), []).append(index)
    groups, alone = [], []
    for group in by_prompt.values():
        prompt_length = len(sequences[group[0]].prompt_ids)
        total = sum(prompt_length + len(sequences[index].response_ids) for index in group)
        if (len(group) - 1) * prompt_length >= MIN_SAVED_SHARE * total:
            groups.append(group)
        else:
            alone.extend(group)
    return groups, alone


def hidden_of_groups(
    loaded: LoadedModel, sequences: Sequence[records.Sequence], groups: Sequence[Group], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of sequence indices, each with the hidden states [N, D] that predict their responses.

    Prompts fill a token budget first; then the responses to them do, sorted by length. Keys and values of at
    most `batch_tokens` prompt tokens and as many tokens of response rows are held.
    """
    lengths = [len(sequences[group[0]].prompt_ids) for group in groups]
    for places in plan_batches(lengths, batch_tokens):
        prompts = [sequences[groups[place][0]].prompt_ids for place in places]
        cache, last_UD = _run_prompts(loaded, prompts)
        rows = [(row, index) for row, place in enumerate(places) for index in groups[place]]
        widths = [max(map(len, prompts)) + len(sequences[index].response_ids) - 1 for _, index in rows]
        for chosen in plan_batches(widths, batch_tokens):
            members = [rows[place] for place in chosen]
            responses = [sequences[index].response_ids for _, index in members]
            prompt_rows = [row for row, _ in members]
            yield (
                [index for _, index in members],
                _run_responses(loaded, cache, last_UD, prompts, prompt_rows, responses),
            )


@torch.inference_mode()
def prompts_can_be_shared(loaded: LoadedModel) -> bool:
    """Whether sharing a prompt gives this model's own numbers, tried on a few tokens."""
    layers = DynamicCache(config=loaded.model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return False
    vocabulary_size = len(loaded.head.weight_VD)
    ids = (np.arange(1, 25, dtype=np.int32) * 7919) % vocabulary_size
    sequences = [
        records.Sequence(prompt_ids=ids[start:end], response_ids=ids[end : end + length])
        for start, end, length in [(0, 6, 5), (0, 6, 2), (8, 11, 6), (8, 11, 1)]
    ]
    ((members, shared_ND),) = hidden_of_groups(loaded, sequences, [[0, 1], [2, 3]], batch_tokens=1000)
    plain_ND = plain_hidden(loaded, [sequences[index] for index in members])
    allowed = 64 * torch.finfo(loaded.model.dtype).eps * float(plain_ND.abs().max())
    difference = float((shared_ND - plain_ND).abs().max())
    if not difference <= allowed:
        log.info("prompts are run once per response: sharing them changes hidden states by %.3g", difference)
    return difference <= allowed


def _run_prompts(loaded: LoadedModel, prompts: Sequence[Ids]) -> tuple[DynamicCache, Tensor]:
    """Keys and values of right-padded prompts, and the hidden state [U, D] of each one's last token."""
    cache = DynamicCache(config=loaded.model.config)
    ids_UP = to_device(pad_right(prompts), loaded.device)
    hidden_UPD = last_hidden(loaded.model, input_ids=ids_UP, past_key_values=cache, use_cache=True)
    last_U = to_device(np.array([len(prompt) - 1 for prompt in prompts]), loaded.device)
    return cache, hidden_UPD[torch.arange(len(prompts), device=loaded.device), last_U]


def _run_responses(
    loaded: LoadedModel,
    prompt_cache: DynamicCache,
    last_UD: Tensor,
    prompts: Sequence[Ids],
    prompt_rows: Sequence[int],
    responses: Sequence[Ids],
) -> Tensor:
    """Hidden states [N, D] that predict the responses; row b continues prompt `prompt_rows[b]`."""
    rows_B = to_device(np.array(prompt_rows), loaded.device)
    hidden_BTD = last_UD[rows_B][:, None]
    inputs_BT = pad_right([response[:-1] for response in responses])
    if inputs_BT.shape[1]:
        lengths_B = np.array([len(prompts[row]) for row in prompt_rows])
        is_prompt_BP = np.arange(max(map(len, prompts))) < lengths_B[:, None]
        mask_BT = np.concatenate([is_prompt_BP, np.ones_like(inputs_BT, dtype=np.bool_)], 1)
        # Padding stays within the context: past it a longrope model would rotate every position otherwise.
        positions_BT = lengths_B[:, None] + np.arange(inputs_BT.shape[1])
        positions_BT = np.minimum(positions_BT, loaded.context_length - 1)
        rest_BTD = last_hidden(
            loaded.model,
            input_ids=to_device(inputs_BT, loaded.device),
            attention_mask=to_device(mask_BT, loaded.device),
            position_ids=to_device(positions_BT, loaded.device),
            past_key_values=_select_rows(prompt_cache, rows_B),
            use_cache=True,
        )
        hidden_BTD = torch.cat([hidden_BTD, rest_BTD], 1)
    return gather_spans(hidden_BTD, [0] * len(responses), [len(response) for response in responses])


def _select_rows(cache: DynamicCache, rows_B: Tensor) -> DynamicCache:
    """A new cache whose row b is row `rows_B[b]` of the given one."""
    selected = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert layer.keys is not None
        assert layer.values is not None
        selected.update(layer.keys.index_select(0, rows_B), layer.values.index_select(0, rows_B), index)
    return selected
