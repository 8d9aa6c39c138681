"""A cache's rollouts as the tensors that training gets, in the cache's order."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lightopd.cache.store import open_cache
from lightopd.objectives.base.batch import BatchTotals
from lightopd.training.data.batches import Microbatch, collate, collect_rows, count_totals
from lightopd.training.data.shard_store import index_cache, store_as_it_is

HELD_BYTES = 2**30
"""Decoded shards that stay in memory while batches cross from one to the next."""


def cache_batches(path: Path, rollouts: int, signals: Sequence[str] | None) -> Iterator[Microbatch]:
    """Batches of so many rollouts, the last one smaller; each batch's totals are its own.

    Raises:
        CacheError: the cache is incomplete or damaged, or has no such signal.
    """
    cache = open_cache(path, signals=signals)
    names = tuple(cache.signals)
    index = index_cache(cache, names, names)
    store = store_as_it_is(cache, names, index.bytes_S, HELD_BYTES)
    for start in range(0, len(index.shard_P), rollouts):
        entries = np.arange(start, min(start + rollouts, len(index.shard_P)))
        rows = collect_rows(store, index, entries, BatchTotals(0, 0))
        yield collate(replace(rows, totals=BatchTotals(*count_totals([rows]))), torch.device("cpu"))
