"""A cache on disk as what `prepare` and the validator read of it, shard by shard.

R = rollouts, N = their response tokens laid end to end; numpy.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.contexts import scored_chunks, text_values
from lightopd.cache.reader import ShardColumns, read_columns, read_shard_columns
from lightopd.cache.signals.horizon import horizons_of
from lightopd.cache.signals.trained_part import trained_part
from lightopd.cache.store import Cache, open_cache
from lightopd.objectives.base.part import Needs


def cache_views(
    cache: Cache, wanted: Needs, shards: Iterable[ShardColumns] | None = None
) -> Iterator[ShardColumns]:
    """The columns of every shard, in order, with what else `wanted` names.

    Args:
        cache: complete, with the signals that `wanted` names.
        wanted: what the objective needs.
        shards: all shards in order, with the columns that `wanted` names; None reads them.

    Raises:
        CacheError: a shard is missing or damaged, or a row of it is not what it must be.
    """
    teacher = mean_rewards(wanted.answers)
    if shards is None:
        seen: set[str] = set()
        horizons = horizons_of(cache, wanted.signals)
        read = (
            read_shard_columns(cache, n, wanted.signals, topk=wanted.topk, seen=seen) for n in cache.shards
        )
        shards = (trained_part(columns, horizons) for columns in read)
    for shard, columns in zip(cache.shards, shards, strict=True):
        if wanted.texts:
            values = {name: text_values(cache, name, shard) for name in wanted.texts}
            columns = replace(columns, text_values_R=values)
        if wanted.chunks:
            chunks = {name: scored_chunks(cache, name, shard) for name in wanted.chunks}
            columns = replace(columns, chunks_RM4=chunks)
        if wanted.answers:
            scores = [teacher.get(prompt, np.nan) for prompt in columns.prompt_ids_by_user]
            columns = replace(columns, teacher_rewards_R=np.array(scores, np.float32))
        yield columns


def mean_rewards(answers: tuple[Path, ...]) -> Mapping[str, float]:
    """Mean reward of each prompt over caches of answers; prompts without a reward are left out."""
    sums: dict[str, list[float]] = {}
    for path in answers:
        cache = open_cache(path, signals=())
        for shard in cache.shards:
            table = read_columns(cache, shard, ["prompt_id", "reward"])
            rewards: NDArray[np.float64] = table.column("reward").to_numpy().astype(np.float64)
            for prompt, reward in zip(table.column("prompt_id").to_pylist(), rewards, strict=True):
                if np.isfinite(reward):
                    sums.setdefault(prompt, []).append(float(reward))
    return {prompt: float(np.mean(rewards)) for prompt, rewards in sums.items()}
