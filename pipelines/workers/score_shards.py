"""Scoring of a signal's shards on an engine, alone or beside other processes that score the same signal.

What a signal has once, its manifest and what its shards are made with, is made by the process that comes
first; the others measure their own engine, and score under the same contract.
"""

import logging
import time
from collections.abc import Sequence
from functools import partial

from lightopd.cache.contexts import CONTEXTS, Contexts, write_contexts
from lightopd.cache.manifests import signal_folder
from lightopd.cache.reader import check_rollouts, read_columns, speaks_of
from lightopd.cache.shards import valid_shard
from lightopd.cache.store import Cache, create_signal
from lightopd.cache.tables import scores_to_table
from lightopd.engines.base import AsksServers, Engine, KeepsHiddenStates, keep_ids_below
from lightopd.engines.kinds import LoadEngine
from lightopd.engines.noise import compare, measure_noise, reference_logprobs, refuse_noise, refuse_replicas
from lightopd.models.limits import precision_of
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines.shared.costs.estimate import own_top_k, support_of
from lightopd.pipelines.shared.overlap import make_and_write
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.scoring.frozen import Frozen, as_it_began, made_now
from lightopd.pipelines.shared.scoring.lost import lost_files, make_lost
from lightopd.pipelines.shared.sequences import num_response_tokens, read_sequences
from lightopd.pipelines.workers.shared_shards import SharedShards
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.manifest import SIGNAL_MANIFEST, NoiseFloor, SignalManifest
from lightopd.schemas.records import Floats, RolloutSignal
from lightopd.schemas.records import Sequence as TokenSequence
from lightopd.under_way import doing

log = logging.getLogger(__name__)


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
    _make_lost(config, cache, contexts, load, shards)
    frozen = as_it_began(config, cache, manifest, contexts)
    manifest = frozen.manifest if frozen else manifest
    shards.refuse_other_settings(folder / SIGNAL_MANIFEST, manifest)
    if (folder / SIGNAL_MANIFEST).exists():
        create_signal(cache, manifest)  # refuses a signal of other settings before a model is loaded
        if contexts is not None:
            shards.once((folder / CONTEXTS).exists, partial(_store_contexts, config, contexts))
    fingerprint = manifest.fingerprint()
    missing = [
        i
        for i in range(total)
        if valid_shard(folder, i, fingerprint) is None or not speaks_of(cache, config.signal, i)
    ]
    if not missing:
        log.info("precompute: nothing to do, all %d shards are there", total)
        shards.finish()
        return None
    check_rollouts(cache)
    checked = read_sequences(cache, missing[0], contexts, horizon=config.horizon)[1]
    reference = reference_logprobs(config.teacher, checked[: config.cross_check])
    with doing(f"precompute: loading {config.teacher.path} with engine {config.engine.kind}"):
        engine = load(config.engine, config.teacher)
    try:
        measured = _measured(config, engine, checked, reference)
        begun = _begin(config, cache, manifest, contexts, engine, measured, shards)
        tokens_per_s = _score_missing(config, cache, begun, contexts, engine, shards, missing)
    finally:
        engine.close()
    shards.finish()
    return tokens_per_s


def _store_contexts(config: PrecomputeConfig, contexts: Contexts) -> None:
    folder = signal_folder(config.cache, config.signal)
    write_contexts(folder, contexts, load_tokenizer(config.teacher))


def _make_lost(
    config: PrecomputeConfig,
    cache: Cache,
    contexts: Contexts | None,
    load: LoadEngine,
    shards: SharedShards,
) -> None:
    """Make again what the signal began with and lost, such as a damaged head that a repair moved aside."""
    if not (lost := lost_files(config, cache)):
        return
    log.info("precompute: making %s again", ", ".join(path.name for path in lost))
    with doing(f"precompute: loading {config.teacher.path} with engine {config.engine.kind}"):
        engine = load(config.engine, config.teacher)
    try:
        shards.once(lambda: not lost_files(config, cache), lambda: make_lost(config, cache, contexts, engine))
    finally:
        engine.close()


def _begin(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    contexts: Contexts | None,
    engine: Engine,
    measured: dict[str, NoiseFloor],
    shards: SharedShards,
) -> Frozen:
    """Make what the signal has once, or wait until another process has; what all shards are made with."""
    folder = signal_folder(cache.path, config.signal)

    def is_done() -> bool:
        files = [SIGNAL_MANIFEST] if contexts is None else [SIGNAL_MANIFEST, CONTEXTS]
        return all((folder / name).exists() for name in files)

    def make() -> None:
        frozen = as_it_began(config, cache, manifest, contexts) or made_now(
            config, cache, manifest, contexts, engine
        )
        create_signal(cache, frozen.manifest.model_copy(update=measured))
        if contexts is not None:
            _store_contexts(config, contexts)

    shards.once(is_done, make)
    begun = as_it_began(config, cache, manifest, contexts)
    assert begun is not None, "made above, here or elsewhere"
    create_signal(cache, begun.manifest)  # refuses what another process began under other settings
    return begun


def _score_missing(
    config: PrecomputeConfig,
    cache: Cache,
    frozen: Frozen,
    contexts: Contexts | None,
    engine: Engine,
    shards: SharedShards,
    missing: list[int],
) -> float:
    folder, total = signal_folder(cache.path, config.signal), cache.manifest.num_shards
    fingerprint, started_s = frozen.manifest.fingerprint(), time.monotonic()
    progress = StageProgress("precompute", folder / "journal.jsonl", "shards", total, total - len(missing))
    made: dict[int, int] = {}  # response tokens that were scored, by shard

    def write(index: int, scored: tuple[list[str], list[RolloutSignal]]) -> None:
        table = scores_to_table(*scored, config.topk_dtype, frozen.manifest.hidden)
        if frozen.rebuilder is not None:
            frozen.rebuilder.refuse(table, read_columns(cache, index, ["response_ids"]), index)
        marker = shards.write(index, table, fingerprint=fingerprint, made_from=frozen.manifest)
        if marker is not None:
            made[index] = marker.tokens

    def done(index: int) -> None:
        if index in made:
            progress.advance(tokens=made[index])

    while missing:
        make_and_write(
            shards.claimed(
                missing,
                fingerprint,
                lambda _: progress.advance(is_own=False),
                lambda index: speaks_of(cache, config.signal, index),
            ),
            lambda index: _score_shard(config, cache, engine, index, contexts, frozen),
            write,
            done,
        )
        missing = shards.unfinished(missing)
    return sum(made.values()) / (time.monotonic() - started_s)


def _measured(
    config: PrecomputeConfig, engine: Engine, sequences: Sequence[TokenSequence], reference: Sequence[Floats]
) -> dict[str, NoiseFloor]:
    """Noise of the engine, and its distance from a reference if there is one; refused beyond the limit."""
    limit, dtype = config.max_noise_nats, precision_of(config.teacher).dtype
    if isinstance(engine, AsksServers):
        refuse_replicas(engine, sequences, limit)
    found = {"noise": measure_noise(engine, sequences)}
    refuse_noise(found["noise"], limit, "two scorings of the same tokens by this engine", dtype)
    if reference:
        scored = [scores.logprobs for scores in engine.score(sequences[: len(reference)], 0)]
        found["cross_check"] = compare(reference, scored)
        refuse_noise(found["cross_check"], limit, "this engine and transformers in float32", dtype)
    return found


def _score_shard(
    config: PrecomputeConfig,
    cache: Cache,
    engine: Engine,
    index: int,
    contexts: Contexts | None,
    frozen: Frozen,
) -> tuple[list[str], list[RolloutSignal]]:
    ids, sequences = read_sequences(cache, index, contexts, support_of(config), config.horizon)
    tokens = num_response_tokens(sequences)
    top_k, least = own_top_k(config), config.min_probability
    with doing(f"precompute: scoring shard {index + 1} of {len(cache.shards)}, {tokens:,} tokens"):
        if frozen.rebuilder is not None:
            assert isinstance(engine, KeepsHiddenStates), "refused when they were to be made"
            scores = engine.score_hidden(sequences, top_k, least, frozen.channels)
        else:
            scores = engine.score(sequences, top_k, least)
    return ids, [keep_ids_below(each, cache.manifest.vocabulary_size) for each in scores]
