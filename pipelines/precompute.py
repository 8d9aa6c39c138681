"""A teacher scores every token of the cached rollouts once; afterwards no teacher is needed.

    lightopd precompute --cache CACHE --teacher TEACHER --top-k 32

The teacher must be the one that wrote the student's fine-tuning data (arXiv 2604.13010, section 3.4);
anything else is refused. A signal lies in `CACHE/signals/NAME/`, row by row beside the rollouts, so a
second teacher or a reference model is added later without touching what is there.
"""

import logging
import time
from functools import partial
from typing import Any

from pydantic import JsonValue

from lightopd.cache.buckets.mirroring import at_commit
from lightopd.cache.buckets.places import at_its_place
from lightopd.cache.contexts import (
    Contexts,
    check_lengths,
    contexts_hash,
    describe_context,
    shown_prompts,
)
from lightopd.cache.index import refresh_index
from lightopd.cache.manifests import as_begun, schema_version_at, signal_folder
from lightopd.cache.store import Cache, content_id, create_cache, open_cache
from lightopd.engines.kinds import describe_engine, load_engine, tail_of
from lightopd.errors import ConfigError
from lightopd.lineage.checks import check_role, check_student
from lightopd.lineage.fingerprint import fingerprint_model, read_student_lineage
from lightopd.models.limits import ModelLimits, model_limits
from lightopd.pipelines.caches.copy_rollouts import copy_rollouts
from lightopd.pipelines.caches.push import push_rollouts
from lightopd.pipelines.sampling.rendering import shown_time
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.pipelines.shared.costs.estimate import estimate, own_top_k
from lightopd.pipelines.shared.preflight import check_top_k, said_now
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.pipelines.shared.scoring.frozen import check_vocabulary
from lightopd.pipelines.shared.scoring.horizons import check_horizon, check_support_reaches
from lightopd.pipelines.shared.scoring.report import precompute_report
from lightopd.pipelines.shared.sequences import (
    read_prompts,
    response_lengths,
)
from lightopd.pipelines.workers.crowd import run_crowd
from lightopd.pipelines.workers.replica import end_with_starter
from lightopd.pipelines.workers.score_shards import score_shards
from lightopd.pipelines.workers.shared_shards import SharedShards, shared_shards
from lightopd.prompts.contexts import render_contexts
from lightopd.prompts.tokens import identified_tokenizer
from lightopd.schemas.configs import PrecomputeConfig
from lightopd.schemas.manifest import (
    CACHE_MANIFEST,
    PLAIN,
    SIGNAL_MANIFEST,
    ModelFingerprint,
    Override,
    SignalManifest,
)
from lightopd.schemas.prompts import WrittenContext

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
    end_with_starter()
    started_s = time.monotonic()
    if config.rollouts:
        config = config.model_copy(update={"rollouts": at_commit(config.rollouts)})
    asked, config = config, at_its_place(config)[0]
    source = open_cache(config.rollouts or config.cache, signals=())
    manifest, contexts = _manifest(config, source)
    if dry_run:
        return estimate(config, source, manifest, tokens_per_s, load, contexts)
    folder, sharing = signal_folder(config.cache, config.signal), config.sharing
    if (joint := run_crowd("precompute", config, folder, source.manifest.num_shards)) is not None:
        return joint
    with (
        writing(config.cache, shared=not sharing.exclusive),
        shared_shards(config.cache, manifest.kind, sharing) as shards,
    ):
        cache = _copied(config, source, shards)
        tokens_per_s = score_shards(config, cache, manifest, contexts, load, shards)
        save_config(asked, "precompute", folder)
        report = precompute_report(
            config, open_cache(config.cache, signals=[config.signal]), tokens_per_s, started_s
        )
        refresh_index(config.cache)
        save_report(report, folder)
        shards.send()
    return report


def _copied(config: PrecomputeConfig, source: Cache, shards: SharedShards) -> Cache:
    """The cache that receives the signal, with the rollouts of another one copied into it, by one process."""
    if not config.rollouts:
        return source

    def is_there() -> bool:
        if not (config.cache / CACHE_MANIFEST).exists():
            return False
        there = open_cache(config.cache, signals=(), incomplete=True)
        return there.manifest.fingerprint() != source.manifest.fingerprint() or not there.missing()

    if shards.url is not None:
        shards.once(is_there, partial(push_rollouts, source, shards.url))
        create_cache(config.cache, source.manifest)  # which refuses another one's that is there
        return open_cache(config.cache, signals=())
    shards.once(is_there, partial(copy_rollouts, source, config.cache))
    return copy_rollouts(source, config.cache)


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
