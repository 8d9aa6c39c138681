"""The student answers prompts once; everything later stages need goes into the cache.

    lightopd rollout --student STUDENT --prompts prompts.jsonl --cache CACHE

Stored for each rollout: exactly the drawn ids (end token included), finish reason, log-probability and
entropy of every token under the raw distribution, and a reward where the prompt has an answer.
"""

import time
from dataclasses import replace

from lightopd.cache.buckets.places import at_its_place
from lightopd.engines.kinds import load_engine
from lightopd.lineage.fingerprint import fingerprint_model, read_student_lineage
from lightopd.pipelines.sampling.red_flags import response_flags
from lightopd.pipelines.sampling.rendering import check_rendering
from lightopd.pipelines.sampling.sample import (
    LoadEngine,
    SamplingJob,
    SamplingPlan,
    plan_sampling,
    sample,
    sampling_figures,
)
from lightopd.pipelines.shared.preflight import said_now
from lightopd.pipelines.shared.reports import Report, override_notes, save_report
from lightopd.pipelines.shared.run_folder import save_config, writing
from lightopd.pipelines.workers.crowd import run_crowd
from lightopd.pipelines.workers.replica import end_with_starter
from lightopd.pipelines.workers.shared_shards import shared_shards
from lightopd.schemas.configs import RolloutConfig
from lightopd.schemas.manifest import Override, SftLineage, StudentLineage


def run(config: RolloutConfig, *, dry_run: bool = False, load: LoadEngine = load_engine) -> Report:
    """Sample the cache's rollouts, or with `dry_run` only say what would be sampled.

    Raises:
        InputError, LineageError, OutputError, EngineError: see their messages; finished shards stay.
    """
    end_with_starter()
    started_s = time.monotonic()
    asked, (config, name) = config, at_its_place(config)
    plan = sampling_plan(config)
    if dry_run:
        return _planned(config, plan)
    folder, sharing = config.cache / "rollouts", config.sharing
    if (joint := run_crowd("rollout", config, folder, plan.manifest.num_shards)) is not None:
        return joint
    with (
        writing(config.cache, shared=not sharing.exclusive),
        shared_shards(config.cache, "rollouts", sharing) as shards,
    ):
        cache = sample(plan, load, shards)
        save_config(asked, "rollout", config.cache)
        report = Report(
            stage="rollout",
            out=name,
            figures=sampling_figures(cache, started_s),
            notes=(*plan.notes, *response_flags(cache), *_notes(plan.manifest.sft, plan.manifest.overrides)),
            seconds=time.monotonic() - started_s,
        )
        save_report(report, config.cache)
        shards.send()
    return report


def sampling_plan(config: RolloutConfig) -> SamplingPlan:
    """What would be sampled, under which contract; nothing is written or loaded on a device."""
    student = fingerprint_model(config.student)
    lineage = read_student_lineage(config.student, student)
    sft, overrides = _sft_lineage(config, lineage)
    job = SamplingJob(
        stage="rollout",
        cache=config.cache,
        origin="student",
        model=config.student,
        prompts=config.prompts,
        sampling=config.sampling,
        engine=config.engine,
        sft=sft,
        shard_rollouts=config.shard_rollouts,
        keep_text=config.keep_text,
        overrides=overrides,
    )
    plan = plan_sampling(job, student)
    taught = lineage.rendering if lineage else None
    allowed = check_rendering(taught, plan.manifest.rendering, config.allow, "rollout")
    manifest = plan.manifest.model_copy(update={"overrides": overrides + allowed})
    return replace(plan, manifest=manifest)


def _sft_lineage(
    config: RolloutConfig, lineage: StudentLineage | None
) -> tuple[SftLineage, tuple[Override, ...]]:
    """What the student's folder says of its fine-tuning, or what the user declares."""
    recorded = lineage.sft if lineage else SftLineage(proof="unknown")
    sft = said_now(recorded, config.sft_teacher, "rollout") or recorded
    return sft, lineage.overrides if lineage else ()


def _planned(config: RolloutConfig, plan: SamplingPlan) -> Report:
    rollouts = len(plan.prompts) * config.sampling.n
    return Report(
        stage="rollout",
        out=str(config.cache),
        figures={
            "prompts": len(plan.prompts),
            "rollouts": rollouts,
            "shards": plan.manifest.num_shards,
            "prompt_tokens": sum(len(ids) for ids in plan.prompt_ids),
            "response_tokens_at_most": rollouts * config.sampling.max_tokens,
        },
        notes=(
            "dry run: nothing was written",
            *plan.notes,
            *_notes(plan.manifest.sft, plan.manifest.overrides),
        ),
    )


def _notes(sft: SftLineage, overrides: tuple[Override, ...]) -> tuple[str, ...]:
    name = sft.teacher.source if sft.teacher else sft.name
    teacher = {
        "recorded": f"fine-tuning teacher: {name} (recorded by sft)",
        "declared": f"fine-tuning teacher: {name} (declared, not proven)",
        "none": "fine-tuning teacher: none is claimed",
        "unknown": "fine-tuning teacher unknown: precompute will want --sft-teacher MODEL, or none",
    }[sft.proof]
    return (teacher, *override_notes(overrides))
