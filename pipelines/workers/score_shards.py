"""Scoring of a signal's shards on an engine, alone or beside other processes that score the same signal.

What a signal has once, its manifest and the shape of its tail, is made by the process that comes first; the
others measure their own engine, and score under the same contract.
"""

import logging
import time
from collections.abc import Sequence

import numpy as np

from lightopd.cache.contexts import CONTEXTS, Contexts, write_contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.reader import check_rollouts
from lightopd.cache.shards import valid_shard
from lightopd.cache.signals.tail_shape import frozen_shape, read_shape, write_shape
from lightopd.cache.store import Cache, create_signal
from lightopd.cache.tables import scores_to_table
from lightopd.engines.base import Engine, SeesWholeTails, keep_ids_below
from lightopd.engines.kinds import LoadEngine
from lightopd.engines.noise import compare, measure_noise, reference_logprobs, refuse_noise
from lightopd.errors import ConfigError
from lightopd.models.limits import precision_of
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines.shared.estimate import own_top_k, support_of
from lightopd.pipelines.shared.overlap import make_and_write
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.sequences import first_sequences, num_response_tokens, read_sequences
from lightopd.pipelines.workers.shared_shards import SharedShards
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.engines import MIN_SHAPE_TOKENS
from lightopd.schemas.manifest import SIGNAL_MANIFEST, NoiseFloor, SignalManifest, TailShape
from lightopd.schemas.records import Floats, RolloutSignal
from lightopd.schemas.records import Sequence as TokenSequence
from lightopd.under_way import doing

log = logging.getLogger(__name__)

SHAPE_TOKENS = 2048
"""Response tokens for the shape of the tail, where `shape_tokens` is left out."""


def score_shards(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    contexts: Contexts | None,
    load: LoadEngine,
    shards: SharedShards,
) -> float | None:
    """Score what is missing; this process's response tokens per second, or None when nothing was missing."""
    folder, total = signal_folder(cache.path, config.signal), cache.manifest.num_shards
    manifest, frozen = _with_shape(config, cache, manifest, contexts)
    shards.refuse_other_settings(folder / SIGNAL_MANIFEST, manifest)
    if (folder / SIGNAL_MANIFEST).exists():
        create_signal(cache, manifest)  # refuses a signal of other settings before a model is loaded
    fingerprint = manifest.fingerprint()
    missing = [i for i in range(total) if valid_shard(folder, i, fingerprint) is None]
    if not missing:
        log.info("precompute: nothing to do, all %d shards are there", total)
        shards.finish()
        return None
    check_rollouts(cache)
    if frozen is not None:
        read_shape(folder, frozen, cache.manifest.vocabulary_size)
    checked = read_sequences(cache, missing[0], contexts)[1]
    reference = reference_logprobs(config.teacher, checked[: config.cross_check])
    with doing(f"precompute: loading {config.teacher.path} with engine {config.engine.kind}"):
        engine = load(config.engine, config.teacher)
    try:
        measured = _measured(config, engine, checked, reference)
        manifest = _begin(config, cache, manifest, contexts, engine, measured, shards)
        tokens_per_s = _score_missing(config, cache, manifest, contexts, engine, shards, missing)
    finally:
        engine.close()
    shards.finish()
    return tokens_per_s


def _with_shape(
    config: PrecomputeConfig, cache: Cache, manifest: SignalManifest, contexts: Contexts | None
) -> tuple[SignalManifest, TailShape | None]:
    """The contract with the shape that scoring began with, where it has begun, and that shape."""
    folder = signal_folder(cache.path, config.signal)
    is_begun, frozen = frozen_shape(folder, cache.manifest.num_shards)
    if not is_begun:
        return manifest, None
    shape = _kept_shape(config, cache, frozen, contexts)
    return manifest.model_copy(update={"tail_shape": shape}), frozen


def _begin(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    contexts: Contexts | None,
    engine: Engine,
    measured: dict[str, NoiseFloor],
    shards: SharedShards,
) -> SignalManifest:
    """Make what the signal has once, or wait until another process has; the contract of all shards."""
    folder = signal_folder(cache.path, config.signal)

    def is_done() -> bool:
        files = [SIGNAL_MANIFEST] if contexts is None else [SIGNAL_MANIFEST, CONTEXTS]
        return all((folder / name).exists() for name in files)

    def make() -> None:
        contract = manifest
        if not frozen_shape(folder, cache.manifest.num_shards)[0]:
            shape = _make_shape(config, cache, engine, contexts)
            contract = manifest.model_copy(update={"tail_shape": shape})
        create_signal(cache, contract.model_copy(update=measured))
        if contexts is not None:
            write_contexts(folder, contexts, load_tokenizer(config.teacher))

    if is_done() and not shards.is_shared:
        make()  # a start that failed may have left a manifest of other settings
    shards.once(is_done, make)
    manifest, _ = _with_shape(config, cache, manifest, contexts)
    create_signal(cache, manifest)  # refuses what another process began under other settings
    return manifest


def _score_missing(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    contexts: Contexts | None,
    engine: Engine,
    shards: SharedShards,
    missing: list[int],
) -> float:
    folder, total = signal_folder(cache.path, config.signal), cache.manifest.num_shards
    fingerprint, started_s = manifest.fingerprint(), time.monotonic()
    progress = StageProgress("precompute", folder / "journal.jsonl", "shards", total, total - len(missing))
    made: set[int] = set()

    def write(index: int, scored: tuple[list[str], list[RolloutSignal]]) -> None:
        table = scores_to_table(*scored, config.topk_dtype)
        if shards.write(index, table, fingerprint=fingerprint, made_from=manifest) is not None:
            made.add(index)

    def done(index: int) -> None:
        if index in made:
            progress.advance(tokens=cache.markers[index].tokens)

    while missing:
        make_and_write(
            shards.claimed(missing, fingerprint, lambda _: progress.advance(is_own=False)),
            lambda index: _score_shard(config, cache, engine, index, contexts),
            write,
            done,
        )
        missing = shards.unfinished(missing)
    return sum(cache.markers[index].tokens for index in made) / (time.monotonic() - started_s)


def _measured(
    config: PrecomputeConfig, engine: Engine, sequences: Sequence[TokenSequence], reference: Sequence[Floats]
) -> dict[str, NoiseFloor]:
    """Noise of the engine, and its distance from a reference if there is one; refused beyond the limit."""
    found = {"noise": measure_noise(engine, sequences)}
    limit, dtype = config.max_noise_nats, precision_of(config.teacher).dtype
    refuse_noise(found["noise"], limit, "two scorings of the same tokens by this engine", dtype)
    if reference:
        scored = [scores.logprobs for scores in engine.score(sequences[: len(reference)], 0)]
        found["cross_check"] = compare(reference, scored)
        refuse_noise(found["cross_check"], limit, "this engine and transformers in float32", dtype)
    return found


def _kept_shape(
    config: PrecomputeConfig, cache: Cache, frozen: TailShape | None, contexts: Contexts | None
) -> TailShape | None:
    """The shape that the signal began with, or, where another is requested, one that does not fit it."""
    if config.shape_tokens is None:
        return frozen
    if config.shape_tokens == 0:
        return None
    tokens = num_response_tokens(first_sequences(cache, config.shape_tokens, contexts))
    return TailShape(sha256=frozen.sha256 if frozen else "none yet", tokens=tokens)


def _make_shape(
    config: PrecomputeConfig, cache: Cache, engine: Engine, contexts: Contexts | None
) -> TailShape | None:
    """Score the first rollouts for the shape of their tails and store it; None where there is to be none.

    Raises:
        ConfigError: it was requested, and the cache has too few tokens or the engine sees no tails.
    """
    is_possible = config.top_k > 0 and config.support == "teacher" and isinstance(engine, SeesWholeTails)
    if config.shape_tokens == 0 or (config.shape_tokens is None and not is_possible):
        return None
    sample = first_sequences(cache, config.shape_tokens or SHAPE_TOKENS, contexts)
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


def _score_shard(
    config: PrecomputeConfig, cache: Cache, engine: Engine, index: int, contexts: Contexts | None
) -> tuple[list[str], list[RolloutSignal]]:
    ids, sequences = read_sequences(cache, index, contexts, support_of(config))
    tokens = cache.markers[index].tokens
    with doing(f"precompute: scoring shard {index + 1} of {len(cache.shards)}, {tokens:,} tokens"):
        scores = engine.score(sequences, own_top_k(config), config.min_probability)
    return ids, [keep_ids_below(each, cache.manifest.vocabulary_size) for each in scores]
