"""A teacher scores every token of the cached rollouts once; afterwards no teacher is needed.

    lightopd precompute --cache CACHE --teacher TEACHER --top-k 32

The teacher must be the one that wrote the student's fine-tuning data (arXiv 2604.13010, section 3.4);
anything else is refused. A signal lies in `CACHE/signals/NAME/`, row by row beside the rollouts, so a
second teacher or a reference model is added later without touching what is there.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from lightopd.cache.contexts import (
    Contexts,
    check_lengths,
    contexts_hash,
    describe_context,
    shown_prompts,
    write_contexts,
)
from lightopd.cache.index import refresh_index
from lightopd.cache.manifests import as_begun, schema_version_at, signal_folder
from lightopd.cache.reader import check_rollouts, read_columns
from lightopd.cache.shards import read_marker, valid_shard, write_shard
from lightopd.cache.store import Cache, content_id, create_signal, open_cache
from lightopd.cache.tables import scores_to_table
from lightopd.engines.base import Engine, KeepsHiddenStates, keep_ids_below
from lightopd.engines.kinds import describe_engine, load_engine, tail_of
from lightopd.engines.noise import compare, measure_noise, reference_logprobs, refuse_noise
from lightopd.errors import ConfigError
from lightopd.lineage.checks import check_role, check_student
from lightopd.lineage.fingerprint import fingerprint_model, read_student_lineage
from lightopd.models.limits import ModelLimits, model_limits, precision_of
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines.caches.copy_rollouts import copy_rollouts
from lightopd.pipelines.sampling.rendering import shown_time
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.costs.estimate import estimate, own_top_k, support_of
from lightopd.pipelines.shared.overlap import make_and_write
from lightopd.pipelines.shared.preflight import check_top_k, said_now
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.pipelines.shared.scoring.frozen import Frozen, as_it_began, check_vocabulary, made_now
from lightopd.pipelines.shared.scoring.horizons import check_horizon, check_support_reaches
from lightopd.pipelines.shared.scoring.report import precompute_report
from lightopd.pipelines.shared.sequences import (
    num_response_tokens,
    read_prompts,
    read_sequences,
    response_lengths,
)
from lightopd.prompts.contexts import render_contexts
from lightopd.prompts.tokens import identified_tokenizer
from lightopd.schemas.configs import PrecomputeConfig, WrittenContext
from lightopd.schemas.manifest import (
    PLAIN,
    SIGNAL_MANIFEST,
    ModelFingerprint,
    NoiseFloor,
    Override,
    SignalManifest,
)
from lightopd.schemas.records import Floats, RolloutSignal
from lightopd.schemas.records import Sequence as TokenSequence
from lightopd.under_way import doing

log = logging.getLogger(__name__)


def run(
    config: PrecomputeConfig,
    *,
    dry_run: bool = False,
    tokens_per_s: float | None = None,
    load: LoadEngine = load_engine,
) -> Report:
    """Score the rollouts, or with `dry_run` say what it would cost in tokens, bytes and hours.

    Raises:
        LineageError: the teacher, its tokenizer or its template is not the one the rollouts call for.
        CacheError, EngineError, OutputError: see their messages; finished shards stay.
    """
    started_s = time.monotonic()
    source = open_cache(config.rollouts or config.cache, signals=())
    manifest, contexts = _manifest(config, source)
    if dry_run:
        return estimate(config, source, manifest, tokens_per_s, load, contexts)
    with writing(config.cache):
        cache = copy_rollouts(source, config.cache) if config.rollouts else source
        tokens_per_s = _score(config, cache, manifest, contexts, load)
        folder = signal_folder(config.cache, config.signal)
        save_config(config, "precompute", folder)
        report = precompute_report(
            config, open_cache(config.cache, signals=[config.signal]), tokens_per_s, started_s
        )
        refresh_index(open_cache(config.cache, incomplete=True))
        save_report(report, folder)
    return report


def _manifest(config: PrecomputeConfig, cache: Cache) -> tuple[SignalManifest, Contexts | None]:
    """The signal's contract and its contexts, after every refusal has had its say."""
    limits = model_limits(config.teacher)
    check_top_k(config)
    check_horizon(config, cache)
    check_vocabulary(config, cache)
    teacher = fingerprint_model(config.teacher)
    tokenizer, found = identified_tokenizer(config.teacher)
    declared = said_now(cache.manifest.sft, config.sft_teacher, "precompute")
    role, allow = config.role, config.allow
    held = _began_as(config, cache, teacher)
    overrides = check_role(role, cache.manifest, declared, held, found, allow, "precompute")
    engine, precision = describe_engine(config.engine, config.teacher)
    context, contexts = _contexts(config, cache, tokenizer, limits)
    support, widest, allowed = _support(config, cache, limits)
    manifest = SignalManifest(
        schema_version=schema_version_at(signal_folder(cache.path, config.signal) / SIGNAL_MANIFEST),
        name=config.signal,
        role=config.role,
        rollouts=cache.manifest.fingerprint(),
        model=teacher,
        precision=precision,
        tokenizer=found,
        sft_declared=declared,
        context=context,
        support=support,
        top_k=widest,
        min_probability=config.min_probability,
        id_limit=width if limits.vocabulary_size > (width := cache.manifest.vocabulary_size) else None,
        topk_dtype=config.topk_dtype,
        tail=tail_of(config.engine),
        horizon=config.horizon,
        engine=engine,
        overrides=overrides + allowed,
    )
    return as_begun(manifest, signal_folder(cache.path, config.signal) / SIGNAL_MANIFEST), contexts


def _began_as(config: PrecomputeConfig, cache: Cache, model: ModelFingerprint) -> ModelFingerprint:
    """The model that is held to its role; for `self`, the one that it was trained from, where it is another.

    A student that was trained to teach itself (arXiv 2605.15113) records what it was trained from.
    """
    sampler = cache.manifest.sampler
    if config.role != "self" or sampler is None or model.is_same_as(sampler):
        return model
    lineage = read_student_lineage(config.teacher, model)
    return lineage.base if lineage is not None and lineage.made_by == "train" and lineage.base else model


def _contexts(
    config: PrecomputeConfig, cache: Cache, tokenizer: Any, limits: ModelLimits
) -> tuple[dict[str, JsonValue], Contexts | None]:
    """What the model is shown before each response, described and whole; None: the student's own."""
    if config.context is None:
        return PLAIN, None
    if isinstance(config.context, WrittenContext):
        contexts = dict(shown_prompts(cache, config.context.text))
        longest = response_lengths(cache, config.horizon)
        check_lengths(contexts, longest, limits.context_length, config.teacher.path)
        described: dict[str, JsonValue] = {"kind": "written", "text": config.context.text}
        return described | {"prompts": contexts_hash(contexts)}, contexts
    own, longest = read_prompts(cache, config.horizon)
    rendered = render_contexts(
        config.context, tokenizer, cache.manifest.rendering, own, shown_time(cache.path)
    )
    check_lengths(rendered, longest, limits.context_length, config.teacher.path)
    return describe_context(config.context, rendered), rendered


def _support(
    config: PrecomputeConfig, cache: Cache, limits: ModelLimits
) -> tuple[dict[str, JsonValue] | None, int, tuple[Override, ...]]:
    """Whose ids the entries are, for the manifest; how many there are at most at a position; overrides."""
    if config.support == "teacher":
        return None, config.top_k, ()
    there = open_cache(config.cache, signals=[config.support_signal])
    described: dict[str, JsonValue] = {
        "kind": config.support,
        "signal": config.support_signal,
        "content": content_id(there, [config.support_signal]),
    }
    made = there.signals[config.support_signal].manifest
    check_support_reaches(config, made)
    if made.model is None:
        raise ConfigError(
            f"signal {config.support_signal} was imported: no model is named; make it with the student"
        )
    overrides = check_student(cache.manifest.sampler, made.model, config.allow, "precompute")
    theirs = made.top_k
    if theirs == 0:
        raise ConfigError(
            f"signal {config.support_signal} of {config.cache} has no top-k; make it with --top-k 16, say, "
            "under another name, and set support_signal"
        )
    return described, min(theirs + own_top_k(config), limits.vocabulary_size), overrides


def _score(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    contexts: Contexts | None,
    load: LoadEngine,
) -> float | None:
    """Score what is missing; response tokens per second, writing included, or None when nothing was."""
    folder = signal_folder(cache.path, config.signal)
    total = cache.manifest.num_shards
    frozen = as_it_began(config, cache, manifest, contexts)
    manifest = frozen.manifest if frozen else manifest
    fingerprint = manifest.fingerprint()
    if (folder / SIGNAL_MANIFEST).exists():
        create_signal(cache, manifest)  # refuses a signal of other settings before a model is loaded
    missing = [i for i in range(total) if valid_shard(folder, i, fingerprint) is None]
    if not missing:
        log.info("precompute: nothing to do, all %d shards are there", total)
        return None
    check_rollouts(cache)
    checked = read_sequences(cache, missing[0], contexts, horizon=config.horizon)[1]
    reference = reference_logprobs(config.teacher, checked[: config.cross_check])
    with doing(f"precompute: loading {config.teacher.path} with engine {config.engine.kind}"):
        engine = load(config.engine, config.teacher)
    try:
        measured = _measured(config, engine, checked, reference)
        if frozen is None:
            frozen = made_now(config, cache, manifest, contexts, engine)
        made = frozen
        create_signal(cache, made.manifest.model_copy(update=measured))
        if contexts is not None:
            write_contexts(folder, contexts, load_tokenizer(config.teacher))
        started_s = time.monotonic()
        progress = StageProgress(
            "precompute", folder / "journal.jsonl", "shards", total, total - len(missing)
        )
        make_and_write(
            missing,
            lambda index: _score_shard(config, cache, engine, index, contexts, made),
            lambda index, scored: _write_shard(config, cache, made, index, scored),
            lambda index: progress.advance(tokens=_scored(folder, index)),
        )
        seconds = time.monotonic() - started_s
    finally:
        engine.close()
    return sum(_scored(folder, index) for index in missing) / seconds


def _scored(folder: Path, index: int) -> int:
    """Response tokens that were scored of a shard."""
    marker = read_marker(folder, index)
    return marker.tokens if marker is not None else 0


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


def _write_shard(
    config: PrecomputeConfig,
    cache: Cache,
    frozen: Frozen,
    index: int,
    scored: tuple[list[str], list[RolloutSignal]],
) -> None:
    table = scores_to_table(*scored, config.topk_dtype, frozen.manifest.hidden)
    if frozen.rebuilder is not None:
        frozen.rebuilder.refuse(table, read_columns(cache, index, ["response_ids"]), index)
    write_shard(
        signal_folder(cache.path, config.signal),
        index,
        table,
        kind=f"signals/{config.signal}",
        fingerprint=frozen.manifest.fingerprint(),
        made_from=frozen.manifest,
    )
