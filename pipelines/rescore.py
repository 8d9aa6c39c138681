"""`lightopd verify --rescore`: does the cache still say what its teacher says?"""

import time
from pathlib import Path

from lightopd.cache.shards import shard_path
from lightopd.cache.store import open_cache, signal_folder
from lightopd.cache.tables import flat_column
from lightopd.engines.factory import load_engine
from lightopd.engines.noise import compare, measure_noise
from lightopd.errors import CacheError
from lightopd.lineage import fingerprint_model
from lightopd.pipelines.reports import Report
from lightopd.pipelines.sampling import LoadEngine
from lightopd.pipelines.sequences import read_sequences
from lightopd.schemas.configs import ModelConfig, PrecomputeConfig

ROUNDING_NATS = 1e-5
"""Float32 rounding of log-probabilities, below which no engine's noise can be told from the format."""
TIMES_NOISE = 4.0
"""How far beyond the engine's own largest difference a re-scored token may lie."""


def rescore(
    path: Path, signal: str, count: int, teacher: str | None = None, load: LoadEngine = load_engine
) -> Report:
    """Score the first `count` rollouts of evenly spread shards again and compare with the cache, nats.

    The limit is `TIMES_NOISE` times the engine's own noise, measured now, alone against in a batch.

    Raises:
        CacheError: the signal has no model (imported), or the model found is another one.
    """
    import pyarrow.parquet as pq

    started_s = time.monotonic()
    cache = open_cache(path, signals=[signal])
    config = _config_of(path, signal, teacher)
    made_by = cache.signals[signal].manifest.model
    if made_by is None or fingerprint_model(config.teacher).identity != made_by.identity:
        raise CacheError(
            f"{config.teacher.path} is not the model that made signal {signal}; give it with --teacher"
        )
    per_shard = -(-count // len(cache.shards))
    engine = load(config.engine, config.teacher)
    try:
        cached, again = [], []
        for shard in cache.shards:
            _, sequences = read_sequences(cache, shard)
            chosen = sequences[: min(per_shard, count - len(cached))]
            again += [scores.logprobs for scores in engine.score(chosen, 0)] if chosen else []
            table = pq.read_table(shard_path(signal_folder(path, signal), shard), columns=["logprobs"])
            values, offsets = flat_column(table.column("logprobs"))
            cached += [values[offsets[i] : offsets[i + 1]] for i in range(len(chosen))]
        noise = measure_noise(engine, read_sequences(cache, cache.shards[0])[1])
    finally:
        engine.close()
    found = compare(cached, again)
    limit = max(ROUNDING_NATS, TIMES_NOISE * noise.max_nats)
    figures: dict[str, JsonValue] = {
        "rollouts": len(cached),
        "tokens": found.tokens,
        "mean_difference_nats": found.mean_nats,
        "max_difference_nats": found.max_nats,
        "noise_mean_nats": noise.mean_nats,
        "noise_max_nats": noise.max_nats,
        "limit_nats": limit,
    }
    differs = found.max_nats > limit
    note = (
        f"differs: cached and re-scored log-probabilities lie {found.max_nats:.3g} nats apart, the engine's own "
        f"noise allows {limit:.3g}; precompute into a new cache"
        if differs
        else f"agrees with its teacher within the engine's own noise (limit {limit:.3g} nats)"
    )
    return Report("verify", str(path), figures, notes=(note,), seconds=time.monotonic() - started_s)


def _config_of(path: Path, signal: str, teacher: str | None) -> PrecomputeConfig:
    """The settings the signal was made with, as `precompute` left them beside it."""
    from lightopd.config import build, read_yaml

    config = build(PrecomputeConfig, read_yaml(str(signal_folder(path, signal) / "precompute.yaml")))
    if teacher is None:
        return config
    return config.model_copy(update={"teacher": ModelConfig(path=teacher, dtype=config.teacher.dtype)})
