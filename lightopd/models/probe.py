"""A trial at load: what a fast attention, a batch or a cache gives must be what the plain model gives.

The plain model is transformers with eager attention, one sequence at a time, without cache, mask or padding.

T = positions of a row, N = positions of all rows laid end to end, D = hidden size, V = vocabulary; nats.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.errors import EngineError
from lightopd.models.head import Head, head_of, last_hidden
from lightopd.models.limits import context_length_in
from lightopd.schemas.records import Ids

LENGTHS = (9, 24)
"""Tokens of the rows that every model is tried on."""
BEYOND = 3
"""Tokens of a row past the length at which a model changes what it does."""
SWITCHES = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
"""Settings that change what a model does beyond a length."""
LONGEST = 96
"""Longest row; a switch beyond it is not tried, since its cost grows with the square of the length."""
FULL_NATS, HALF_NATS = 2e-4, 0.1
"""Mean difference that rounding explains in float32, and in half precision."""


def probe_rows(model: PreTrainedModel, vocabulary_size: int) -> list[Ids]:
    """Ids of several lengths, int32: short, longer, and a few tokens past every switch below `LONGEST`."""
    config = model.config.get_text_config(decoder=True).to_dict()
    switches = [config[key] for key in SWITCHES if isinstance(config.get(key), int)]
    longest = min(LONGEST, context_length_in(config, "the model"))
    beyond = [switch + BEYOND for switch in switches if switch + BEYOND <= longest]
    lengths = {min(length, longest) for length in (*LENGTHS, *beyond)}
    random = np.random.default_rng(0)
    return [random.integers(0, vocabulary_size, length).astype(np.int32) for length in sorted(lengths)]


@torch.no_grad()
def plain_hidden_states(model: PreTrainedModel, rows: Sequence[Ids]) -> list[Tensor]:
    """Hidden states [T, D] of every row by itself under eager attention."""
    device = model.get_output_embeddings().weight.device
    inputs = [torch.from_numpy(row.astype(np.int64)).to(device)[None] for row in rows]
    with _eager(model) as plain:
        return [last_hidden(plain, input_ids=ids_BT, use_cache=False)[0] for ids_BT in inputs]


@torch.no_grad()
def check_attention(model: PreTrainedModel) -> None:
    """Compare the attention that a model was loaded with to eager attention.

    Raises:
        EngineError: another attention would be another model.
    """
    attention = model.config._attn_implementation
    if attention == "eager":
        return
    head = head_of(model)
    rows = probe_rows(model, len(head.weight_VD))
    ids = [torch.from_numpy(row.astype(np.int64)).to(head.weight_VD.device)[None] for row in rows]
    found = [last_hidden(model, input_ids=ids_BT, use_cache=False)[0] for ids_BT in ids]
    check_same(head, found, plain_hidden_states(model, rows), f"under attention {attention}")


@torch.no_grad()
def check_same(head: Head, found: Sequence[Tensor], plain: Sequence[Tensor], where: str) -> None:
    """Refuse hidden states whose log-probabilities are not those of the plain model.

    Args:
        head: what makes logits of them.
        found: hidden states [T, D] of each row, or of its last positions.
        plain: hidden states [T, D] of the whole rows, see `plain_hidden_states`.
        where: what was tried, as in "gives other log-probabilities WHERE".

    Raises:
        EngineError: they differ by more than rounding explains; names by how much, and what to do.
    """
    same = torch.cat([whole[-len(part) :] for part, whole in zip(found, plain, strict=True)])
    expected_NV = head.logits(same).log_softmax(1)
    difference_NV = (head.logits(torch.cat(list(found))).log_softmax(1) - expected_NV).abs()
    difference_N = (expected_NV.exp() * difference_NV.nan_to_num(posinf=0.0)).sum(1)
    limit = FULL_NATS if same.dtype in (torch.float32, torch.float64) else HALF_NATS
    mean = float(difference_N.mean())
    if not mean <= limit:
        raise EngineError(
            f"the model gives other log-probabilities {where} than alone under eager attention: they lie "
            f"{mean:.3g} nats apart on average, {float(difference_N.max()):.3g} at most, and at most "
            f"{limit:g} is rounding; set the model's attention to eager, or run it with engine vllm"
        )


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model under eager attention, where it has one: over the same weights, nothing is copied."""
    before = model.config._attn_implementation
    if before == "eager":
        yield model
        return
    twin = _eager_twin(model)
    if twin is not None:
        yield twin
        return
    try:
        model.set_attn_implementation("eager")
    except (ValueError, AttributeError):  # code of the model's own may know one attention only
        yield model
        return
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def _eager_twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """A second model over the same weights; None where it cannot be made (quantised weights, say).

    Older families choose their attention when they are built, and keep it whatever is set later.
    """
    config = copy.deepcopy(model.config)
    weight = model.get_output_embeddings().weight
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with init_empty_weights(include_buffers=False):
            twin = type(model)._from_config(config, attn_implementation="eager")
        twin.load_state_dict(model.state_dict(), assign=True)
        twin.tie_weights()
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError):
        return None
    finally:
        torch.set_default_dtype(before)
    for name, buffer in twin.named_buffers():
        if buffer.is_meta:
            return None
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, buffer.to(weight.device))
    return None if any(each.is_meta for each in twin.parameters()) else twin.eval()
