"""The student is trained against the cache, with no teacher alive.

    lightopd train --cache CACHE --student STUDENT --out RUN

Refused: a student that did not sample these rollouts, another tokenizer or template, a cache that fails
its checks or lacks what the objective needs. The trained student is a plain Hugging Face folder, or an
adapter's.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from lightopd.cache.buckets.mirroring import at_commit, folder_of
from lightopd.cache.manifests import orphaned_signals, signal_names
from lightopd.cache.signals.horizon import horizon_notes
from lightopd.cache.store import Cache, content_id, open_cache
from lightopd.lineage.checks import all_overrides, check_student, check_teacher, check_tokenizer
from lightopd.lineage.fingerprint import fingerprint_model, model_folder, write_student_lineage
from lightopd.models.load import context_length_of, outline
from lightopd.objectives.preparation.serving import check_cache, teachers_of
from lightopd.objectives.requirements import needs, needs_on
from lightopd.pipelines.shared.gap import suggestion
from lightopd.pipelines.shared.model_card import scored_by, write_model_card
from lightopd.pipelines.shared.reports import Report, override_notes, save_report
from lightopd.pipelines.shared.run_folder import leave_unless, save_config, writing
from lightopd.pipelines.shared.training_checks import check_training
from lightopd.prompts.tokens import identified_tokenizer
from lightopd.ranks import is_main
from lightopd.schemas.configs import TrainConfig
from lightopd.schemas.manifest import ModelFingerprint, Override, SftLineage, StudentLineage
from lightopd.training.data.sizes import cached_sizes
from lightopd.training.fit import FitResult, fit
from lightopd.training.measures.accuracy import AccuracyMeter, make_meter
from lightopd.training.privacy.record import planned_privacy, privacy_notes
from lightopd.training.student.adapters import trained_student
from lightopd.training.student.memory import available_memory, estimate_memory

log = logging.getLogger(__name__)


def run(config: TrainConfig, *, dry_run: bool = False) -> Report:
    """Train the student, resuming from the newest whole checkpoint; or only check with `dry_run`.

    Raises:
        LineageError, CacheError, TrainingError, OutputError: see their messages; checkpoints stay.
    """
    started_s = time.monotonic()
    config = config.model_copy(update={"cache": at_commit(config.cache)})
    cache = open_cache(config.cache, signals=_signals_there(config))
    student = fingerprint_model(config.student)
    overrides = cache.manifest.overrides + _checked(config, cache, student)
    accuracy = None if config.accuracy is None else make_meter(config.accuracy, config.student)
    suggested = suggestion(
        cache,
        config.objective,
        steps=config.steps,
        batch_sequences=config.batch_sequences,
        learning_rate=config.optimizer.lr,
        student=config.student.path,
        out=str(config.out),
    )
    if dry_run:
        check_training(config, config.objective, asks_student=accuracy is not None)
        return _plan(config, cache, suggested, accuracy, _memory(config, cache))
    if suggested and is_main():
        log.warning("%s", suggested)
    with writing(config.out):
        save_config(config, "train", config.out, only_first=True)
        result = fit(
            cache,
            config.student,
            config.out,
            config,
            config.objective,
            staleness=config.staleness,
            continue_from=config.continue_from,
            accuracy=accuracy,
        )
        leave_unless(result.is_main)
        report = _report(config, cache, result, overrides, started_s)
        _write_lineage(config, cache, student, overrides, result.student, result.exported_step)
        save_config(config, "train", config.out)
        save_report(report, config.out)
    return report


def _signals_there(config: TrainConfig) -> list[str]:
    """Signals the objective reads and the cache has, whole or not; another one may still be in the making."""
    folder = folder_of(config.cache)
    there = {*signal_names(folder), *orphaned_signals(folder)}
    return [name for name in needs(config.objective).signals if name in there]


def _checked(config: TrainConfig, cache: Cache, student: ModelFingerprint) -> tuple[Override, ...]:
    check_cache(config.objective, cache)
    overrides = check_student(cache.manifest.sampler, student, config.allow, "train")
    for name in teachers_of(config.objective):
        signal = cache.signals[name].manifest
        if signal.role not in ("teacher", "self"):  # precompute held it to neither
            overrides += check_teacher(_taught_by(cache, [name]), signal.model, config.allow, "train")
    _, found = identified_tokenizer(config.student)
    return overrides + check_tokenizer(cache.manifest.tokenizer, found, config.allow, "train")


def _taught_by(cache: Cache, signals: Sequence[str]) -> SftLineage:
    """The student's SFT teacher: as the rollouts say, or as it was declared for one of the signals later."""
    declared = (cache.signals[name].manifest.sft_declared for name in signals)
    return next((sft for sft in declared if sft is not None), cache.manifest.sft)


def _write_lineage(
    config: TrainConfig,
    cache: Cache,
    student: ModelFingerprint,
    overrides: tuple[Override, ...],
    folder: Path,
    steps: int,
) -> None:
    used = needs(config.objective).signals
    trained = fingerprint_model(trained_student(config.student, folder))
    lineage = StudentLineage(
        student=trained,
        base=student,
        sft=_taught_by(cache, used),
        made_by="train",
        rendering={k: v for k, v in cache.manifest.rendering.items() if k != "row_options"} or None,
        cache=content_id(cache, used),
        overrides=all_overrides([overrides, *(cache.signals[name].manifest.overrides for name in used)]),
    )
    write_student_lineage(folder, lineage)
    rollouts = sum(marker.rows for marker in cache.markers)
    facts = {
        **scored_by({name: cache.signals[name].manifest.model for name in used}),
        "rollouts": f"{rollouts} of {cache.manifest.num_prompts} prompts",
        "steps": steps,
    }
    write_model_card(folder, lineage, config.student, config, facts)


def _memory(config: TrainConfig, cache: Cache) -> tuple[str, ...]:
    """What the memory of a device would go to, rollouts as long as a micro-batch or the context allows."""
    available = available_memory(config)
    if available is None:
        return ()
    student = outline(
        model_folder(config.student).path, trust_remote_code=config.student.trust_remote_code
    ).requires_grad_(config.adapter is None)
    longest = min(config.micro_batch_tokens, context_length_of(student))
    wanted = needs_on(config.objective, cache)
    estimate = estimate_memory(student, config, longest, cached_sizes(cache, wanted))
    more = "" if config.adapter is None else "; the adapter's own weights are not in it"
    return (estimate.sentence(available) + more,)


def _plan(
    config: TrainConfig,
    cache: Cache,
    suggested: str | None,
    accuracy: AccuracyMeter | None,
    memory: tuple[str, ...],
) -> Report:
    tokens = sum(marker.tokens for marker in cache.markers)
    rollouts = sum(marker.rows for marker in cache.markers)
    return Report(
        stage="train",
        out=str(config.out),
        figures={
            "rollouts": rollouts,
            "response_tokens": tokens,
            "steps": config.steps,
            "passes_over_cache": config.steps * config.batch_sequences / max(1, rollouts),
            **({} if accuracy is None else {"accuracy_answers": accuracy.num_answers(config.steps)}),
            **planned_privacy(config, cache.manifest.num_prompts),
        },
        notes=(
            "dry run: manifests, student and objective fit together; shards were not read, nothing trained",
        )
        + tuple(horizon_notes(cache, needs(config.objective).signals))
        + memory
        + ((suggested,) if suggested else ()),
    )


def _report(
    config: TrainConfig, cache: Cache, result: FitResult, overrides: tuple[Override, ...], started_s: float
) -> Report:
    seconds = time.monotonic() - started_s
    best = (
        (f"the student is that of step {result.exported_step}, the best by {config.best.metric}",)
        if config.best
        else ()
    )
    return Report(
        stage="train",
        out=str(config.out),
        figures={
            "steps": result.steps,
            **{name: value for name, value in result.metrics.items() if name not in ("step", "stale")},
            **({"exported_step": result.exported_step} if config.best else {}),
            **result.privacy,
            "tokens": result.tokens,  # of the whole run; the last row's are of its step
            "seconds": round(seconds, 2),
        },
        dropped={"without a trained token": result.rollouts_left_out} if result.rollouts_left_out else {},
        notes=(
            *privacy_notes(result.privacy),
            *horizon_notes(cache, needs(config.objective).signals),
            *_staleness(result),
            *best,
            *result.notes,
            *override_notes(overrides),
        ),
        seconds=seconds,
    )


def _staleness(result: FitResult) -> tuple[str, ...]:
    """The one verdict on the cache, in words; nothing where no step found it stale."""
    if not result.stale_steps:
        return ()
    first, last = result.stale_steps[0], result.stale_steps[-1]
    if last < result.steps:
        return (f"the cache was stale between steps {first} and {last}, and is not at the end",)
    return (f"the cache went stale at step {first}: roll out again from the trained student",)
