"""What a scoring pass would cost: tokens, bytes on disk, hours, before anything is paid."""

import time
from collections.abc import Callable

from lightopd.cache.contexts import Contexts
from lightopd.cache.shards import shard_bytes
from lightopd.cache.store import Cache
from lightopd.cache.tables import scores_to_table
from lightopd.engines.base import Engine
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.shared.sequences import read_sequences, response_lengths
from lightopd.schemas.configs import EngineConfig, ModelConfig, PrecomputeConfig
from lightopd.schemas.manifest import SignalManifest

TRIAL_ROLLOUTS = 32
"""Rollouts that are scored to measure rate and size when no rate is given."""


def own_top_k(config: PrecomputeConfig) -> int:
    """Most likely tokens that the model itself adds at a position."""
    return 0 if config.support == "student" else config.top_k


def support_of(config: PrecomputeConfig) -> str | None:
    """Signal whose ids are scored as well; None for none."""
    return None if config.support == "teacher" else config.support_signal


def estimate(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    tokens_per_s: float | None,
    load: Callable[[EngineConfig, ModelConfig], Engine],
    contexts: Contexts | None,
) -> Report:
    """Tokens, bytes and hours of `precompute`, at the given rate or at one measured on a few rollouts.

    With a given rate no model is loaded, and the bytes are those of uncompressed columns: an upper bound.
    """
    tokens = cache.num_tokens
    if config.horizon is not None:
        tokens = sum(response_lengths(cache, config.horizon).values())
    if tokens_per_s is None:
        tokens_per_s, bytes_per_token = _measure(config, cache, load, contexts)
        basis = f"rate and size measured on {TRIAL_ROLLOUTS} rollouts"
    else:
        bytes_per_token = _columns_bytes(manifest)
        basis = "rate as given; bytes before compression"
    return Report(
        stage="precompute",
        out=str(config.cache),
        figures={
            "rollouts": cache.num_rollouts,
            "response_tokens": cache.num_tokens,
            **({} if config.horizon is None else {"scored_tokens": tokens}),
            "tokens_per_s": tokens_per_s,
            "hours": tokens / tokens_per_s / 3600,
            "bytes_per_token": bytes_per_token * tokens / max(1, cache.num_tokens),
            "bytes": int(tokens * bytes_per_token),
        },
        notes=(f"dry run: nothing was written; {basis}",),
    )


def _measure(
    config: PrecomputeConfig,
    cache: Cache,
    load: Callable[[EngineConfig, ModelConfig], Engine],
    contexts: Contexts | None,
) -> tuple[float, float]:
    ids, sequences = read_sequences(cache, 0, contexts, support_of(config), config.horizon)
    ids, sequences = ids[:TRIAL_ROLLOUTS], sequences[:TRIAL_ROLLOUTS]
    engine = load(config.engine, config.teacher)
    try:
        engine.score(sequences[:1], own_top_k(config), config.min_probability)
        started_s = time.monotonic()
        scores = engine.score(sequences, own_top_k(config), config.min_probability)
        seconds = time.monotonic() - started_s
    finally:
        engine.close()
    tokens = max(1, sum(len(sequence.response_ids) for sequence in sequences))
    content = shard_bytes(scores_to_table(ids, scores, config.topk_dtype), kind="trial", fingerprint="")
    return tokens / max(seconds, 1e-9), len(content) / tokens


def _columns_bytes(manifest: SignalManifest) -> float:
    """Sampled log-probability, tail and count at 4 bytes each, and `top_k` ids and values."""
    value_bytes = 2 if manifest.topk_dtype == "float16" else 4
    return 12 + manifest.top_k * (4 + value_bytes)
