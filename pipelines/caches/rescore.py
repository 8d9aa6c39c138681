"""`lightopd verify --rescore`: does the cache still say what its teacher says?"""

import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from pydantic import JsonValue

from lightopd.cache.contexts import Contexts, read_contexts
from lightopd.cache.shards import shard_path
from lightopd.cache.store import Cache, open_cache, signal_folder
from lightopd.cache.tables import flat_column
from lightopd.config import build, read_yaml
from lightopd.engines.base import Engine
from lightopd.engines.kinds import load_engine
from lightopd.engines.noise import compare, measure_noise
from lightopd.errors import CacheError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.shared.sequences import read_sequences
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.manifest import NoiseFloor
from lightopd.schemas.records import Floats

ROUNDING_NATS = 1e-5
"""Float32 rounding of log-probabilities, below which no engine's noise can be told from the format."""
TIMES_NOISE = 4.0
"""How far beyond the engine's own largest difference a re-scored token may lie."""


def rescore(
    path: Path, signal: str, count: int, teacher: str | None = None, load: LoadEngine = load_engine
) -> tuple[Report, bool]:
    """Score `count` rollouts, spread over the shards, again and compare with the cache, nats.

    The limit is `TIMES_NOISE` times the engine's own noise, measured now: alone against in a batch.

    Returns:
        The report, and whether cache and teacher agree.

    Raises:
        CacheError: the signal has no model (imported), or the model found is another one.
    """
    started_s = time.monotonic()
    cache = open_cache(path, signals=[signal])
    config = _settings_of(cache, signal, teacher)
    described = cache.signals[signal].manifest.context
    contexts = read_contexts(signal_folder(path, signal), described)
    engine = load(config.engine, config.teacher)
    try:
        cached, again = _score_again(cache, signal, count, engine, contexts)
        noise = measure_noise(engine, read_sequences(cache, cache.shards[0], contexts)[1])
    finally:
        engine.close()
    found, limit = compare(cached, again), max(ROUNDING_NATS, TIMES_NOISE * noise.max_nats)
    agrees = found.max_nats <= limit
    note = (
        f"agrees with its teacher within the engine's own noise (limit {limit:.3g} nats)"
        if agrees
        else f"cached and re-scored log-probabilities lie {found.max_nats:.3g} nats apart, the engine's own "
        f"noise allows {limit:.3g}; precompute into a new cache"
    )
    figures = _figures(len(cached), found, noise)
    return Report("verify", str(path), figures, notes=(note,), seconds=time.monotonic() - started_s), agrees


def _score_again(
    cache: Cache, signal: str, count: int, engine: Engine, contexts: Contexts | None
) -> tuple[list[Floats], list[Floats]]:
    cached: list[Floats] = []
    again: list[Floats] = []
    num_shards = len(cache.shards)
    for place, shard in enumerate(cache.shards):
        share = count * (place + 1) // num_shards - count * place // num_shards
        if share == 0:
            continue
        sequences = read_sequences(cache, shard, contexts)[1][:share]
        again += [scores.logprobs for scores in engine.score(sequences, 0)]
        cached += _cached_logprobs(cache, signal, shard, sequences)
    return cached, again


def _cached_logprobs(cache: Cache, signal: str, shard: int, sequences: Sequence[object]) -> list[Floats]:
    table = pq.read_table(shard_path(signal_folder(cache.path, signal), shard), columns=["logprobs"])
    values, offsets = flat_column(table.column("logprobs"))
    return [values[offsets[row] : offsets[row + 1]] for row in range(len(sequences))]


def _figures(num_rollouts: int, found: NoiseFloor, noise: NoiseFloor) -> dict[str, JsonValue]:
    return {
        "rollouts": num_rollouts,
        "tokens": found.tokens,
        "mean_difference_nats": found.mean_nats,
        "max_difference_nats": found.max_nats,
        "noise_mean_nats": noise.mean_nats,
        "noise_max_nats": noise.max_nats,
    }


def _settings_of(cache: Cache, signal: str, teacher: str | None) -> PrecomputeConfig:
    """The settings the signal was made with, as `precompute` left them beside it."""
    config = build(PrecomputeConfig, read_yaml(str(signal_folder(cache.path, signal) / "precompute.yaml")))
    if teacher is not None:
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"path": teacher})})
    made_by = cache.signals[signal].manifest.model
    if made_by is None or fingerprint_model(config.teacher).identity != made_by.identity:
        raise CacheError(
            f"{config.teacher.path} is not the model that made signal {signal}; give it with --teacher"
        )
    return config
