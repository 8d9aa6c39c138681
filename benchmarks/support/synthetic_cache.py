"""Caches of random rollouts with random scores, written and opened by the package itself."""

# N = response tokens of a rollout, K = cached ids at each position

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.shards import write_shard
from lightopd.cache.store import Cache, create_cache, create_signal, open_cache
from lightopd.cache.tables import rollout_id, rollouts_to_table, scores_to_table
from lightopd.objectives.requirements import needs
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.manifest import CacheManifest, SftLineage, SignalManifest
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.records import Rollout, RolloutSignal
from lightopd.training.data.plan import CacheIndex
from lightopd.training.data.shard_store import FirstReading, ShardStore
from lightopd.training.data.split import select_rollouts

NO_SAMPLER = ""
"""The identity that ids are made with where a manifest names no sampler."""


def open_data(
    path: Path, objective: ObjectiveConfig, window_bytes: int = 2**31
) -> tuple[ShardStore, CacheIndex]:
    """A cache read for the first time, as a training run reads it."""
    cache, asked = open_cache(path), needs(objective)
    reading = FirstReading(cache, asked.signals, asked.topk, window_bytes)
    index = select_rollouts(cache, objective, asked, 0, reading).trained
    return reading.store(index), index


def write_random_cache(
    path: Path,
    *,
    num_shards: int,
    per_shard: int,
    top_k: int,
    vocabulary_size: int,
    lengths: tuple[int, int] | list[int],
    prompt_tokens: int = 64,
) -> Cache:
    """A cache whose shards are copies of one, one rollout a prompt.

    Responses have `lengths` tokens: evenly spread between a pair, or the lengths of a list.
    """
    numbers = np.random.default_rng(0)
    sizes = lengths if isinstance(lengths, list) else np.linspace(*lengths, per_shard).astype(int)
    rollouts = [
        _rollout(numbers, index, int(size), prompt_tokens, vocabulary_size)
        for index, size in enumerate(numbers.permutation(sizes))
    ]
    scores = [_scores(numbers, rollout, top_k, vocabulary_size) for rollout in rollouts]
    manifest = _manifest(num_shards, per_shard, vocabulary_size)
    create_cache(path, manifest)
    signal = _signal(manifest, top_k)
    create_signal(open_cache(path, incomplete=True), signal)
    first = rollouts_to_table(rollouts)
    first_scored = scores_to_table([one.rollout_id for one in rollouts], scores, "float16")
    for index in range(num_shards):
        own, scored = _sample_of(first, first_scored, rollouts, index)
        write_shard(rollouts_folder(path), index, own, kind="rollouts", fingerprint=manifest.fingerprint())
        folder, fingerprint = signal_folder(path, "teacher"), signal.fingerprint()
        write_shard(folder, index, scored, kind="signals/teacher", fingerprint=fingerprint)
    return open_cache(path)


def _sample_of(
    own: pa.Table, scored: pa.Table, rollouts: list[Rollout], index: int
) -> tuple[pa.Table, pa.Table]:
    """The same tokens as the samples of another shard: no two rows of a cache have one id."""
    names = [rollout_id(one.prompt_ids, one.response_ids, NO_SAMPLER, index) for one in rollouts]
    columns = {
        "rollout_id": pa.array(names, pa.string()),
        "sample_index": pa.array([index] * len(names), pa.int32()),
    }
    return _with(own, columns), _with(scored, {"rollout_id": columns["rollout_id"]})


def _with(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), column)
    return table


def _rollout(
    numbers: np.random.Generator, index: int, size: int, prompt_tokens: int, vocabulary_size: int
) -> Rollout:
    prompt_ids = numbers.integers(1, vocabulary_size, prompt_tokens).astype(np.int32)
    response_ids = numbers.integers(1, vocabulary_size, size).astype(np.int32)
    return Rollout(
        rollout_id=rollout_id(prompt_ids, response_ids, NO_SAMPLER, 0),
        prompt_id=f"prompt-{index}",
        sample_index=0,
        origin="student",
        domain=None,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        loss_mask=np.ones(size, dtype=bool),
        turns=np.zeros(size, dtype=np.int32),
        logprobs=-numbers.exponential(1, size).astype(np.float32),
        entropies=numbers.exponential(1, size).astype(np.float32),
        finish_reason="stop",
        truncated=False,
        answer=None,
        reward=None,
        prompt_text=None,
        response_text=None,
    )


def _scores(
    numbers: np.random.Generator, rollout: Rollout, top_k: int, vocabulary_size: int
) -> RolloutSignal:
    """A support of distinct ids with the sampled token first, whose mass is nine tenths."""
    ids_N = rollout.response_ids
    stride = vocabulary_size // (top_k + 1)
    ids_NK = (ids_N[:, None] + stride * np.arange(top_k)) % vocabulary_size
    weights_NK = np.sort(numbers.exponential(1, ids_NK.shape) ** 4, axis=1)[:, ::-1] + 1e-6
    logprobs_NK = np.log(0.9 * weights_NK / weights_NK.sum(1, keepdims=True)).astype(np.float32)
    return RolloutSignal(
        logprobs=logprobs_NK[:, 0],
        topk_counts=np.full(len(ids_N), top_k, dtype=np.int32),
        topk_ids=ids_NK.astype(np.int32).ravel(),
        topk_logprobs=logprobs_NK.ravel(),
        tail_logprobs=np.full(len(ids_N), np.log(0.1), dtype=np.float32),
    )


def _manifest(num_shards: int, per_shard: int, vocabulary_size: int) -> CacheManifest:
    return CacheManifest(
        schema_version=SCHEMA_VERSION,
        lightopd_version="0",
        origin="student",
        sampler=None,
        precision=None,
        sft=SftLineage(proof="none"),
        tokenizer=None,
        vocabulary_size=vocabulary_size,
        sampling=None,
        prompts="prompts",
        num_prompts=num_shards * per_shard,
        shard_rollouts=per_shard,
        num_shards=num_shards,
        engine=None,
    )


def _signal(manifest: CacheManifest, top_k: int) -> SignalManifest:
    return SignalManifest(
        schema_version=SCHEMA_VERSION,
        name="teacher",
        role="teacher",
        rollouts=manifest.fingerprint(),
        model=None,
        precision=None,
        tokenizer=None,
        top_k=top_k,
        topk_dtype="float16",
        tail="exact",
        engine=None,
    )
