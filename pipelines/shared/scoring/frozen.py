"""What a signal is made with and never changes: the shape of its tail; the head and statistics of its states.

All of it is made from the cache's first rollouts before the first shard is written, and read again by a run
that resumes, so that a signal that was stopped has the bytes of one that was not.
"""

from dataclasses import dataclass

import numpy as np

from lightopd.cache.contexts import Contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.signals.channels import (
    Channels,
    channels_from_sums,
    write_channels,
)
from lightopd.cache.signals.hidden import write_head
from lightopd.cache.signals.rebuilt import Rebuilder, rebuilder_of
from lightopd.cache.signals.tail_shape import begun_manifest, read_shape, write_shape
from lightopd.cache.store import Cache
from lightopd.engines.base import Engine, KeepsHiddenStates, SeesWholeTails
from lightopd.errors import ConfigError
from lightopd.models.limits import model_limits
from lightopd.pipelines.shared.sequences import first_sequences, num_response_tokens
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.engines import MIN_SHAPE_TOKENS
from lightopd.schemas.manifest import SignalManifest
from lightopd.schemas.signals.kinds import HiddenStates, TailShape
from lightopd.under_way import doing

SHAPE_TOKENS = 2048
"""Response tokens for the shape of the tail, where `shape_tokens` is left out."""
NOT_YET = "none yet"
"""Where a file's hash would be, of what the signal did not begin with."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the shards of a signal are made with."""

    manifest: SignalManifest
    channels: Channels | None = None
    """Of int8 hidden states."""
    rebuilder: Rebuilder | None = None
    """Holds what is written against what can be rebuilt from it, where hidden states are kept."""


def as_it_began(
    config: PrecomputeConfig, cache: Cache, manifest: SignalManifest, contexts: Contexts | None
) -> Frozen | None:
    """The contract with what the signal began with, or differing from it where another is requested.

    None where nothing was scored yet.

    Raises:
        CacheError: the signal's manifest is broken, or what it names is missing or damaged.
    """
    folder = signal_folder(cache.path, config.signal)
    begun = begun_manifest(folder, cache.manifest.num_shards)
    if begun is None:
        return None
    shape = _kept_shape(config, cache, begun.tail_shape, contexts)
    hidden = _kept_hidden(config, cache, begun.hidden, contexts)
    kept = manifest.model_copy(update={"tail_shape": shape, "hidden": hidden})
    if begun.tail_shape is not None:
        read_shape(folder, begun.tail_shape, cache.manifest.vocabulary_size)
    if hidden != begun.hidden:
        return Frozen(kept)  # is refused by name when the signal is opened
    return _opened(cache, kept)


def made_now(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    contexts: Contexts | None,
    engine: Engine,
) -> Frozen:
    """The contract with what is made now, before the first shard.

    Raises:
        ConfigError: the cache has too few tokens, or the engine does not see what is needed.
    """
    hidden = _make_hidden(config, cache, engine, contexts)
    shape = make_shape(config, cache, engine, contexts)
    return _opened(cache, manifest.model_copy(update={"tail_shape": shape, "hidden": hidden}))


def _opened(cache: Cache, manifest: SignalManifest) -> Frozen:
    if manifest.hidden is None:
        return Frozen(manifest)
    rebuilder = rebuilder_of(cache.path, manifest, cache.manifest.vocabulary_size)
    return Frozen(manifest, rebuilder.channels, rebuilder)


def check_vocabulary(config: PrecomputeConfig, cache: Cache) -> None:
    """Refuse hidden states of a model whose head has not the student's vocabulary.

    Raises:
        ConfigError: names both widths.
    """
    theirs, own = model_limits(config.teacher).vocabulary_size, cache.manifest.vocabulary_size
    if config.keep == "hidden" and theirs != own:
        raise ConfigError(
            f"keep: hidden compares two heads of one vocabulary; {config.teacher.path} has {theirs} outputs, "
            f"the student {own}; leave keep out, which keeps a top-k"
        )


def _kept_shape(
    config: PrecomputeConfig, cache: Cache, frozen: TailShape | None, contexts: Contexts | None
) -> TailShape | None:
    """The shape that the signal began with, or, where another is requested, one that does not fit it."""
    if config.shape_tokens is None:
        return frozen
    if config.shape_tokens == 0:
        return None
    tokens = num_response_tokens(first_sequences(cache, config.shape_tokens, contexts, config.horizon))
    return TailShape(sha256=frozen.sha256 if frozen else NOT_YET, tokens=tokens)


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


def _kept_hidden(
    config: PrecomputeConfig, cache: Cache, frozen: HiddenStates | None, contexts: Contexts | None
) -> HiddenStates | None:
    """The hidden states that the signal began with, or, where others are requested, what does not fit it."""
    if config.keep != "hidden":
        return None
    found = frozen or HiddenStates(size=1, format=config.hidden_format, head=NOT_YET)
    if config.hidden_format == "bfloat16":
        return found.model_copy(update={"format": "bfloat16", "channels": None, "tokens": None})
    tokens = num_response_tokens(first_sequences(cache, config.hidden_tokens, contexts))
    return found.model_copy(
        update={"format": "int8", "channels": found.channels or NOT_YET, "tokens": tokens}
    )


def _make_hidden(
    config: PrecomputeConfig, cache: Cache, engine: Engine, contexts: Contexts | None
) -> HiddenStates | None:
    """Store the head, and for int8 the statistics of the first rollouts' hidden states.

    Raises:
        ConfigError: the cache has too few tokens, or the engine gives no hidden states.
    """
    if config.keep != "hidden":
        return None
    if not isinstance(engine, KeepsHiddenStates):
        raise ConfigError(f"keep: hidden needs engine hf; {type(engine).__name__} gives no hidden states")
    if config.hidden_format == "int8":
        found, tokens = make_channels(config, cache, engine, contexts)
    head = engine.own_head()
    described = HiddenStates(
        size=head.weight_VD.shape[1], format=config.hidden_format, head=write_head(cache.path, head)
    )
    if config.hidden_format == "bfloat16":
        return described
    return described.model_copy(update={"channels": found, "tokens": tokens})


def make_channels(
    config: PrecomputeConfig, cache: Cache, engine: KeepsHiddenStates, contexts: Contexts | None
) -> tuple[str, int]:
    """Store the statistics of the first rollouts' hidden states; their SHA-256, and of how many tokens.

    Raises:
        ConfigError: the cache has too few tokens.
    """
    sample = first_sequences(cache, config.hidden_tokens, contexts)
    tokens = num_response_tokens(sample)
    if tokens < MIN_SHAPE_TOKENS:
        raise ConfigError(
            f"keep: hidden: {cache.path} has {tokens} response tokens, the statistics of int8 need "
            f"{MIN_SHAPE_TOKENS} or more; sample more rollouts, or set hidden_format: bfloat16"
        )
    with doing(f"precompute: the statistics of the hidden states, from {tokens:,} tokens"):
        channels = channels_from_sums(*engine.sum_hidden(sample), tokens)
    return write_channels(signal_folder(cache.path, config.signal), channels), tokens
