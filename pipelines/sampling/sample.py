"""Sampling into a cache: shared by rollout, the teacher's half of sft, and evaluation.

Prompts are rendered to ids once; shards of whole prompt groups are sampled, judged and written one by
one. A shard that is there and valid is never sampled again, so a stopped run resumes where it was.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightopd import __version__
from lightopd.cache.index import query, refresh_index
from lightopd.cache.manifests import as_begun, read_manifest, schema_version_at
from lightopd.cache.shards import valid_shard
from lightopd.cache.store import Cache, create_cache, open_cache
from lightopd.cache.tables import rollout_id, rollouts_to_table
from lightopd.engines.base import Engine
from lightopd.engines.kinds import LoadEngine as LoadEngine
from lightopd.engines.kinds import describe_engine
from lightopd.lineage.fingerprint import fingerprint_model, fingerprint_tokenizer
from lightopd.pipelines.sampling.red_flags import answer_flags, check_answers
from lightopd.pipelines.sampling.rendering import refuse_another_day, rendering_of, shown_time
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.workers.shared_shards import SharedShards, alone
from lightopd.prompts.render import render_prompts
from lightopd.prompts.tokens import prompt_text, response_text
from lightopd.rewards.reward import reward_of
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import EngineConfig, ModelConfig, PromptsConfig, SamplingConfig
from lightopd.schemas.manifest import CACHE_MANIFEST, CacheManifest, ModelFingerprint, Override, SftLineage
from lightopd.schemas.records import Ids, Prompt, Rollout, Sample
from lightopd.under_way import doing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplingJob:
    """Everything that decides what is sampled and where it goes."""

    stage: str
    cache: Path
    origin: Literal["student", "teacher"]
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig
    engine: EngineConfig
    sft: SftLineage
    shard_rollouts: int
    keep_text: bool = True
    overrides: tuple[Override, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """A job with its prompts rendered and its manifest made; nothing is loaded on a device yet."""

    job: SamplingJob
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Ids]
    tokenizer: Any
    stops: tuple[int, ...]
    sampler: ModelFingerprint
    manifest: CacheManifest
    notes: tuple[str, ...] = ()
    """What the prompts were recognised as, for the report."""

    @property
    def prompts_per_shard(self) -> int:
        """Groups of one prompt stay together in a shard."""
        return max(1, self.job.shard_rollouts // self.job.sampling.n)


def plan_sampling(job: SamplingJob, sampler: ModelFingerprint | None = None) -> SamplingPlan:
    """Load and render the prompts, fingerprint model and tokenizer, and write down the contract.

    Raises:
        InputError: unusable prompts, or a prompt that leaves no room for a response.
    """
    rendered = render_prompts(job.prompts, job.model, shown_time(job.cache))
    prompts, prompt_ids = rendered.prompts, rendered.prompt_ids
    check_answers(prompts)
    _check_penalty(job)
    flags = answer_flags(prompts, rendered.tokenizer, job.sampling.max_tokens)
    pairs = zip(prompts, prompt_ids, strict=True)
    sampler = sampler or fingerprint_model(job.model)
    engine, precision = describe_engine(job.engine, job.model)
    per_shard = max(1, job.shard_rollouts // job.sampling.n)
    manifest = CacheManifest(
        schema_version=schema_version_at(job.cache / CACHE_MANIFEST),
        lightopd_version=__version__,
        origin=job.origin,
        sampler=sampler,
        precision=precision,
        sft=job.sft,
        tokenizer=fingerprint_tokenizer(rendered.tokenizer, rendered.stops),
        vocabulary_size=rendered.limits.vocabulary_size,
        rendering=rendering_of(job.prompts, prompts),
        rendered_at=rendered.clock.isoformat() if rendered.clock else None,
        sampling=job.sampling,
        prompts=canonical_hash([_content(prompt, ids) for prompt, ids in pairs] + [[job.keep_text]]),
        num_prompts=len(prompts),
        shard_rollouts=job.shard_rollouts,
        num_shards=-(-len(prompts) // per_shard),
        engine=engine,
        overrides=job.overrides,
    )
    manifest = as_begun(manifest, job.cache / CACHE_MANIFEST)
    assert manifest.sampler is not None, "given above"
    return SamplingPlan(
        job,
        prompts,
        prompt_ids,
        rendered.tokenizer,
        rendered.stops,
        manifest.sampler,
        manifest,
        (*rendered.notes, *flags),
    )


def _check_penalty(job: SamplingJob) -> None:
    """Refuse before a model is loaded what engine hf would refuse after."""
    if job.engine.kind == "hf":
        from lightopd.engines.hf.generate import check_penalty

        check_penalty(job.sampling)


def _content(prompt: Prompt, ids: Ids) -> list[Any]:
    """What of a prompt decides the bytes of its rollouts: a corrected answer changes their rewards."""
    return [prompt.prompt_id, ids.tolist(), prompt.answer, prompt.domain, prompt.verifier]


def missing_shards(plan: SamplingPlan) -> list[int]:
    """Numbers of the shards that are not there yet, whole and made under the same contract."""
    folder, fingerprint = plan.job.cache / "rollouts", plan.manifest.fingerprint()
    return [i for i in range(plan.manifest.num_shards) if valid_shard(folder, i, fingerprint) is None]


def sample(plan: SamplingPlan, load: LoadEngine, shards: SharedShards | None = None) -> Cache:
    """Sample every shard that is not there yet, alone or with others; the finished cache."""
    job = plan.job
    refuse_another_day(job.cache, plan.manifest, plan.tokenizer)
    return write_missing_shards(
        job.stage,
        job.cache,
        plan.manifest,
        lambda: load(job.engine, job.model),
        lambda engine, index: _sample_shard(plan, engine, index),
        shards,
    )


def write_missing_shards(
    stage: str,
    path: Path,
    manifest: CacheManifest,
    load: Callable[[], Engine],
    make: Callable[[Engine, int], list[Rollout]],
    shards: SharedShards | None = None,
) -> Cache:
    """Make the rollouts of every shard that is not there yet; the engine is loaded only if one is missing."""
    shards = shards or alone(path, "rollouts")
    shards.refuse_other_settings(path / CACHE_MANIFEST, manifest)
    shards.once((path / CACHE_MANIFEST).exists, lambda: create_cache(path, manifest))
    create_cache(path, manifest)  # refuses what another process made under other settings
    there = read_manifest(path / CACHE_MANIFEST, CacheManifest)
    manifest = manifest.model_copy(update={"rendered_at": there.rendered_at})
    fingerprint, total = manifest.fingerprint(), manifest.num_shards
    missing = [i for i in range(total) if valid_shard(path / "rollouts", i, fingerprint) is None]
    if missing:
        progress = StageProgress(stage, path / "journal.jsonl", "shards", total, total - len(missing))
        with doing(f"{stage}: loading the model"):
            engine = load()
        try:
            while missing:
                for index in shards.claimed(missing, fingerprint, lambda _: progress.advance(is_own=False)):
                    with doing(f"{stage}: making shard {index + 1} of {total}"):
                        table = rollouts_to_table(make(engine, index))
                    marker = shards.write(index, table, fingerprint=fingerprint, made_from=manifest)
                    if marker is not None:
                        progress.advance(tokens=marker.tokens)
                missing = shards.unfinished(missing)
        finally:
            engine.close()
    else:
        log.info("%s: nothing to do, all %d shards are there", stage, total)
    shards.finish()
    cache = open_cache(path, signals=())
    refresh_index(path)
    return cache


def _sample_shard(plan: SamplingPlan, engine: Engine, index: int) -> list[Rollout]:
    job, width = plan.job, plan.prompts_per_shard
    chosen = range(index * width, min((index + 1) * width, len(plan.prompts)))
    rows = [(i, sample_index) for i in chosen for sample_index in range(job.sampling.n)]
    samples = engine.generate(
        [plan.prompt_ids[i] for i, _ in rows],
        job.sampling,
        [f"{plan.prompts[i].prompt_id}/{sample_index}" for i, sample_index in rows],
        sorted({*plan.stops, *job.sampling.stop_ids}),
    )
    return [_rollout(plan, i, k, drawn) for (i, k), drawn in zip(rows, samples, strict=True)]


def _rollout(plan: SamplingPlan, row: int, sample_index: int, drawn: Sample) -> Rollout:
    prompt, prompt_ids = plan.prompts[row], plan.prompt_ids[row]
    length = len(drawn.response_ids)
    text = response_text(drawn.response_ids, plan.tokenizer)
    keep = plan.job.keep_text
    return Rollout(
        rollout_id=rollout_id(prompt_ids, drawn.response_ids, plan.sampler.identity, sample_index),
        prompt_id=prompt.prompt_id,
        sample_index=sample_index,
        origin=plan.job.origin,
        domain=prompt.domain,
        prompt_ids=prompt_ids,
        response_ids=drawn.response_ids,
        loss_mask=np.ones(length, dtype=np.bool_),
        turns=np.zeros(length, dtype=np.int32),
        logprobs=drawn.logprobs,
        entropies=drawn.entropies,
        finish_reason=drawn.finish_reason,
        truncated=drawn.finish_reason == "length",
        answer=prompt.answer,
        reward=reward_of(prompt, text),
        prompt_text=prompt_text(prompt_ids, plan.tokenizer) if keep else None,
        response_text=text if keep else None,
        behavior_logprobs=drawn.behavior_logprobs,
    )


def sampling_figures(cache: Cache, started_s: float) -> dict[str, Any]:
    """Counts and rates of a finished cache's rollouts, for a report."""
    row = query(
        cache.path,
        """select count(*) as rollouts, count(distinct prompt_id) as prompts,
        sum(len(response_ids))::bigint as response_tokens, avg(len(response_ids)) as mean_response_tokens,
        avg(truncated::int) as truncated_share, avg(reward) as mean_reward from rollouts""",
    ).to_pylist()[0]
    seconds = time.monotonic() - started_s
    size = sum(marker.size_bytes for marker in cache.markers)
    tokens = max(1, int(row["response_tokens"] or 0))
    return {**row, "bytes_per_token": size / tokens, "seconds": round(seconds, 2)}
