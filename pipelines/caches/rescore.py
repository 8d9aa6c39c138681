"""`lightopd verify --rescore`: does the cache still say what its teacher says?"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import JsonValue

from lightopd.cache.contexts import Contexts, read_contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.reader import read_columns
from lightopd.cache.signals.rounding import largest_error, largest_tail_error
from lightopd.cache.store import Cache, open_cache
from lightopd.cache.tables import split_lists
from lightopd.config import build, read_yaml
from lightopd.engines.base import Engine, keep_ids_below
from lightopd.engines.kinds import load_engine
from lightopd.engines.noise import compare, measure_noise
from lightopd.errors import CacheError, ConfigError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.costs.estimate import own_top_k, support_of
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.shared.sequences import read_sequences
from lightopd.schemas.cache import SIGNALS
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.records import RolloutSignal

ROUNDING_NATS = 1e-5
"""Float32 rounding of log-probabilities, below which no engine's noise can be told from the format."""
TIMES_NOISE = 4.0
"""How far beyond the engine's own largest difference a re-scored token may lie."""


def rescore(
    path: Path,
    signal: str,
    count: int,
    teacher: str | None = None,
    load: LoadEngine = load_engine,
    seed: int = 0,
) -> tuple[Report, bool]:
    """Score `count` rollouts, drawn by `seed`, again; compare log-probabilities, top-k and tails, nats.

    The limit is `TIMES_NOISE` times the engine's own noise, measured now: alone against in a batch. Ids of a
    top-k may differ where their log-probability lies within the limit of the last entry: a tie.

    Returns:
        The report, and whether cache and teacher agree.

    Raises:
        ConfigError: `count` is not positive.
        CacheError: the signal has no model (imported), or the model found is another one.
    """
    if count < 1:
        raise ConfigError(f"--rescore {count}: give the number of rollouts to score again, 1 or more")
    started_s = time.monotonic()
    cache = open_cache(path, signals=[signal])
    config = _settings_of(cache, signal, teacher)
    manifest = cache.signals[signal].manifest
    contexts = read_contexts(signal_folder(cache.path, signal), manifest.context)
    engine = load(config.engine, config.teacher)
    try:
        cached, again = _score_again(cache, config, _drawn(cache, count, seed), engine, contexts)
        first = read_sequences(cache, cache.shards[0], contexts, horizon=config.horizon)[1]
        noise = measure_noise(engine, first)
    finally:
        engine.close()
    found = compare([one.logprobs for one in cached], [one.logprobs for one in again])
    limit = max(ROUNDING_NATS, TIMES_NOISE * noise.max_nats)
    pairs = list(zip(cached, again, strict=True))
    dtype = manifest.topk_dtype
    apart = max((_topk_apart(one, other, dtype, limit) for one, other in pairs), default=0.0)
    tails = max((_tails_apart(one, other, dtype) for one, other in pairs), default=0.0)
    agrees = max(found.max_nats, apart, tails) <= limit
    note = (
        f"agrees with its teacher within the engine's own noise (limit {limit:.3g} nats)"
        if agrees
        else f"cached and re-scored log-probabilities lie {found.max_nats:.3g} nats apart, those of the "
        f"top-k {apart:.3g}, tails {tails:.3g} in probability; the engine's own noise allows {limit:.3g}: "
        "precompute into a new cache"
    )
    figures: dict[str, JsonValue] = {
        "rollouts": len(cached),
        "tokens": found.tokens,
        "mean_difference_nats": found.mean_nats,
        "max_difference_nats": found.max_nats,
        "top_k_difference_nats": apart,
        "tail_difference": tails,
        "noise_mean_nats": noise.mean_nats,
        "noise_max_nats": noise.max_nats,
    }
    seconds = time.monotonic() - started_s
    return Report("verify", str(cache.path), figures, notes=(note,), seconds=seconds), agrees


def _drawn(cache: Cache, count: int, seed: int) -> dict[int, list[int]]:
    """Rows by shard, `count` in all, drawn from the whole cache."""
    places = [(shard, row) for shard in cache.shards for row in range(cache.marker(shard).rows)]
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    rows: dict[int, list[int]] = {}
    for shard, row in (places[place] for place in sorted(chosen)):
        rows.setdefault(shard, []).append(row)
    return rows


def _score_again(
    cache: Cache,
    config: PrecomputeConfig,
    rows: dict[int, list[int]],
    engine: Engine,
    contexts: Contexts | None,
) -> tuple[list[RolloutSignal], list[RolloutSignal]]:
    cached: list[RolloutSignal] = []
    again: list[RolloutSignal] = []
    for shard, chosen in rows.items():
        sequences = read_sequences(cache, shard, contexts, support_of(config), config.horizon)[1]
        scored = engine.score([sequences[row] for row in chosen], own_top_k(config), config.min_probability)
        limit = cache.signals[config.signal].manifest.id_limit
        again += scored if limit is None else [keep_ids_below(each, limit) for each in scored]
        table = read_columns(cache, shard, SIGNALS.names[1:], config.signal).take(pa.array(chosen))
        columns: Any = (split_lists(table.column(name)) for name in table.column_names)
        cached += [RolloutSignal(*row) for row in zip(*columns, strict=True)]
    return cached, again


def _topk_apart(cached: RolloutSignal, again: RolloutSignal, dtype: str, limit: float) -> float:
    """Largest difference of a top-k's values beyond their rounding, nats; infinite where an id is there once
    and is no tie."""
    worst = 0.0
    for one, other in zip(_by_position(cached), _by_position(again), strict=True):
        for token in one.keys() & other.keys():
            apart = abs(one[token] - other[token])
            worst = max(worst, apart - _error(other[token], dtype))
        for token in one.keys() ^ other.keys():
            mine, theirs = (one, other) if token in one else (other, one)
            last = min(theirs.values(), default=-np.inf)
            rounding = _error(last, dtype) if np.isfinite(last) else 0.0
            if mine[token] > last + limit + rounding:
                return float("inf")
    return worst


def _error(logprob: float, dtype: str) -> float:
    return float(largest_error(np.array([logprob]), dtype)[0])


def _by_position(scores: RolloutSignal) -> Iterator[dict[int, float]]:
    """Log-probability by token id, at each position."""
    end = 0
    for count in scores.topk_counts.tolist():
        start, end = end, end + count
        ids, logprobs = (values[start:end].tolist() for values in (scores.topk_ids, scores.topk_logprobs))
        yield dict(zip(ids, logprobs, strict=True))


def _tails_apart(cached: RolloutSignal, again: RolloutSignal, dtype: str) -> float:
    """Largest difference of the mass outside the top-k beyond its rounding, in probability."""
    masses = np.exp(again.tail_logprobs.astype(np.float64))
    gaps = np.abs(np.exp(cached.tail_logprobs.astype(np.float64)) - masses)
    return float((gaps - masses * np.expm1(largest_tail_error(dtype))).max(initial=0.0))


def _settings_of(cache: Cache, signal: str, teacher: str | None) -> PrecomputeConfig:
    """The settings the signal was made with, as `precompute` left them beside it."""
    config = build(PrecomputeConfig, read_yaml(str(signal_folder(cache.path, signal) / "precompute.yaml")))
    if teacher is not None:
        other = {"path": teacher, "revision": None}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=other)})
    made_by = cache.signals[signal].manifest.model
    if made_by is None or not fingerprint_model(config.teacher).is_same_as(made_by):
        raise CacheError(
            f"{config.teacher.path} is not the model that made signal {signal}; give it with --teacher"
        )
    return config
