"""The shape of a signal's tail as `precompute` makes it: from the first rollouts, before the first shard."""

import numpy as np

from lightopd.cache.contexts import Contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.signals.tail_shape import write_shape
from lightopd.cache.store import Cache
from lightopd.engines.base import Engine, SeesWholeTails
from lightopd.errors import ConfigError
from lightopd.pipelines.shared.sequences import first_sequences, num_response_tokens
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.engines import MIN_SHAPE_TOKENS
from lightopd.schemas.manifest import TailShape
from lightopd.under_way import doing

SHAPE_TOKENS = 2048
"""Response tokens for the shape of the tail, where `shape_tokens` is left out."""


def kept_shape(
    config: PrecomputeConfig, cache: Cache, frozen: TailShape | None, contexts: Contexts | None
) -> TailShape | None:
    """The shape that the signal began with, or, where another is requested, one that does not fit it."""
    if config.shape_tokens is None:
        return frozen
    if config.shape_tokens == 0:
        return None
    tokens = num_response_tokens(first_sequences(cache, config.shape_tokens, contexts, config.horizon))
    return TailShape(sha256=frozen.sha256 if frozen else "none yet", tokens=tokens)


def make_shape(
    config: PrecomputeConfig, cache: Cache, engine: Engine, contexts: Contexts | None
) -> TailShape | None:
    """Score the first rollouts for the shape of their tails and store it; None where there is to be none.

    Raises:
        ConfigError: it was requested, and the cache has too few tokens or the engine sees no tails.
    """
    is_possible = config.top_k > 0 and config.support == "teacher" and isinstance(engine, SeesWholeTails)
    if config.shape_tokens == 0 or (config.shape_tokens is None and not is_possible):
        return None
    sample = first_sequences(cache, config.shape_tokens or SHAPE_TOKENS, contexts, config.horizon)
    tokens = num_response_tokens(sample)
    if tokens < MIN_SHAPE_TOKENS or not isinstance(engine, SeesWholeTails):
        if config.shape_tokens is None:
            return None
        raise ConfigError(
            f"shape_tokens: {cache.path} has {tokens} response tokens, the shape of a tail needs "
            f"{MIN_SHAPE_TOKENS} or more, and engine hf; sample more rollouts, or set shape_tokens: 0"
        )
    with doing(f"precompute: the shape of the tail, from {tokens:,} tokens"):
        sums_V = engine.sum_tails(sample, config.top_k, config.min_probability)
    width = cache.manifest.vocabulary_size
    sums_V = np.pad(sums_V[:width], (0, max(0, width - len(sums_V))))
    if not sums_V.any() and config.shape_tokens is None:
        return None  # every token of the vocabulary is kept
    return write_shape(signal_folder(cache.path, config.signal), sums_V, tokens)
