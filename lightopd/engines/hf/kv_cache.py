"""A key-value cache that grows without being copied at every token.

The cache of transformers concatenates: each new token copies all keys and values before it, which for long
responses takes longer than the model itself.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MIN_ROOM = 32
"""Fewest columns a buffer grows by; beyond that it grows by a quarter."""


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for a model; layers with a sliding window or a state are the model's own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """Keys and values [B, heads, T, head size] as views of buffers with room at the end of T."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            room = end + max(MIN_ROOM, end // 4)
            self._buffers = (_with_room(key_states, room), _with_room(value_states, room))
            if start:
                self._buffers[0][:, :, :start] = self.keys
                self._buffers[1][:, :, :start] = self.values
        self._buffers[0][:, :, start:end] = key_states
        self._buffers[1][:, :, start:end] = value_states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows, some of them several times or not at all."""
        super().reorder_cache(beam_idx)
        self._buffers = None


def _with_room(states: Tensor, room: int) -> Tensor:
    return states.new_empty((*states.shape[:2], room, states.shape[3]))
