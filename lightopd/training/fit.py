"""Fit a student to a cache: from settings and folders to a trained Hugging Face folder.

    out/metrics.csv   out/checkpoints/step-NNNNNN/   out/student/

Called again with the same settings it resumes from the newest whole checkpoint, or finds everything done.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from pydantic import JsonValue
from transformers import PreTrainedModel

from lightopd.cache.store import Cache
from lightopd.errors import TrainingError
from lightopd.files import output_error
from lightopd.models.causal_attention import use_causal_attention
from lightopd.models.head import check_head
from lightopd.models.limits import model_limits
from lightopd.models.load import context_length_of
from lightopd.models.probe import check_attention
from lightopd.objectives.base.part import Needs
from lightopd.objectives.preparation.cached_signals import cached_heads, cached_tails
from lightopd.objectives.preparation.serving import cache_remarks, check_cache, check_origin, warnings_of
from lightopd.objectives.requirements import needs_on
from lightopd.objectives.state import restored
from lightopd.ranks import is_first_rank, is_main, is_worker
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig, StalenessLimits
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.callbacks import (
    Checkpoints,
    KeepBest,
    MetricsFile,
    ProgressLine,
    StepDone,
    StopWhenStale,
)
from lightopd.training.checkpoints.checkpoint import (
    TrainerState,
    best_checkpoint,
    check_same_run,
    known_best,
    newest_checkpoint,
    note_exported,
    remove_leftovers,
)
from lightopd.training.checkpoints.export import export
from lightopd.training.checkpoints.run_identity import recipe_of
from lightopd.training.checkpoints.untouched import check_names
from lightopd.training.data.batches import CacheData
from lightopd.training.data.plan import GIB, check_lengths, make_plan, row_tokens
from lightopd.training.data.shard_store import FirstReading, ShardStore
from lightopd.training.data.sizes import cached_sizes
from lightopd.training.data.split import SelectedRollouts, refuse_ids_beyond, select_rollouts
from lightopd.training.distributed.launch import as_worker, must_start, report, start_workers
from lightopd.training.distributed.strategies import check_strategy, uses_gpu
from lightopd.training.jumps import check_held_out_scores
from lightopd.training.loggers import LogSteps, make_loggers
from lightopd.training.measures.accuracy import AccuracyMeter
from lightopd.training.measures.best import is_over
from lightopd.training.measures.held_out import HeldOut, held_out_objective
from lightopd.training.measures.metrics_file import keep_metrics, read_metrics
from lightopd.training.messages import few_rollouts
from lightopd.training.module import Start, StudentModule
from lightopd.training.optimizer import check_low_memory
from lightopd.training.privacy.limits import check_privacy
from lightopd.training.privacy.record import privacy_spent, record_of
from lightopd.training.student.adapters import is_adapted, load_student
from lightopd.training.student.compile import compile_layers
from lightopd.training.student.memory import available_memory, estimate_memory
from lightopd.training.student.packed_rows import check_packing
from lightopd.training.student.router_loss import check_experts
from lightopd.training.student.training_mode import prepare_student
from lightopd.training.trainer import quiet_libraries, run_trainer
from lightopd.training.warm_start import optimizer_state_hash, start_after
from lightopd.under_way import doing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a finished run says."""

    student: Path
    """Hugging Face folder of the trained student, or of its adapter."""
    steps: int
    """Optimiser steps done, over all resumptions."""
    exported_step: int
    """The step whose student is exported: the last, or the best."""
    metrics: dict[str, float]
    """What was measured at that step; empty when metrics.csv was removed."""
    tokens: int
    """Prompt and response tokens trained on, padding left out."""
    seconds: float
    """Time spent in steps, over all resumptions."""
    stale_steps: tuple[int, ...]
    """Steps at which the cache was stale."""
    rollouts_left_out: int | None
    """Rollouts without a trained token; None when the run was finished before."""
    notes: tuple[str, ...]
    """What the objective dropped from the cache, and its warnings; empty when the run was finished before."""
    privacy: dict[str, float | str | None]
    """What the run has spent of its prompts' privacy; empty where it is not private."""
    is_main: bool
    """False in the helper processes of a run on several devices, which must write nothing."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The arguments of `fit`, and what follows from them."""

    cache: Cache
    student: ModelConfig
    out: Path
    finetune: FinetuneConfig
    objective: ObjectiveConfig
    limits: StalenessLimits | None
    needed: Needs
    recipe: dict[str, JsonValue]
    accuracy: AccuracyMeter | None


def fit(
    cache: Cache,
    student: ModelConfig,
    out: Path,
    finetune: FinetuneConfig,
    objective: ObjectiveConfig,
    *,
    staleness: StalenessLimits | None = None,
    continue_from: Path | None = None,
    accuracy: AccuracyMeter | None = None,
) -> FitResult:
    """Train `student` against `cache` and write the trained student to `out/student`.

    The weights are trained and stored in float32, whatever `student.dtype` says. Lineage is the caller's
    affair.

    Args:
        cache: complete, with the signals that the objective reads.
        student: where the run begins; a checkpoint in `out` goes before it.
        out: folder of the run.
        finetune: steps, batch, optimiser, devices.
        objective: the loss.
        staleness: limits of the drift from the student at rollout; None for answers of a teacher.
        continue_from: `out` of a finished run that made this student; its optimiser state is resumed here.
        accuracy: puts prompts to the student during training and decides nothing; None for none.

    Raises:
        ConfigError: a logger's package is missing, the batch cannot be dealt to the devices, or the
            objective jumps and nothing is held out.
        CacheError: a signal is missing, a shard is damaged or changes during the run.
        TrainingError: a checkpoint of another run, a rollout that does not fit, a loss that is not finite.
        OutputError: no space or no permission; the last checkpoint is kept.
        KeyboardInterrupt: after a clean stop; the last checkpoint is kept.
    """
    with as_worker():
        return _fit(cache, student, out, finetune, objective, staleness, continue_from, accuracy)


def _fit(
    cache: Cache,
    student: ModelConfig,
    out: Path,
    finetune: FinetuneConfig,
    objective: ObjectiveConfig,
    staleness: StalenessLimits | None,
    continue_from: Path | None,
    accuracy: AccuracyMeter | None,
) -> FitResult:
    needed = needs_on(objective, cache)
    starts_workers = not is_worker() and must_start(finetune)
    check_held_out_scores(objective, finetune)
    check_privacy(objective, needed, finetune)
    check_strategy(finetune, asks_student=accuracy is not None)
    check_cache(objective, cache)
    check_origin(cache, needed)
    found = newest_checkpoint(out / "checkpoints")
    recipe = recipe_of(cache, student, finetune, objective, needed, found[1].recipe if found else {})
    if continue_from is not None:
        recipe["continue_from"] = optimizer_state_hash(continue_from, student)
    run = _Run(cache, student, out, finetune, objective, staleness, needed, recipe, accuracy)
    if found is not None:
        check_same_run(*found, recipe)
    start = _start(*found, finetune) if found else start_after(continue_from)
    if start.step > finetune.steps:
        raise TrainingError(
            f"{out} has a checkpoint of step {start.step}, and steps is {finetune.steps}; set steps to "
            f"{start.step} or more, or choose another out folder"
        )
    said: Mapping[str, Any] = {}
    if start.step < finetune.steps and not (found and _has_ended(run, found[1])):
        said = start_workers(finetune) if starts_workers else _train(run, start)
    else:
        _say((), [f"nothing to do: {out} has the checkpoint of step {start.step}, its last"])
    return _result(run, said)


def _has_ended(run: _Run, state: TrainerState) -> bool:
    """Whether a run ended before its last step, under the limits that are set now."""
    is_stale = state.is_stale and run.limits is not None and run.limits.stop_when_stale
    return is_stale or is_over(state.best, run.finetune.best)


def _start(checkpoint: Path, state: TrainerState, finetune: FinetuneConfig) -> Start:
    objective = restored(state.objective)
    best = known_best(checkpoint.parent, state) if finetune.best else None
    return Start(state.step, checkpoint, objective, best, state.num_exceeded)


def _train(run: _Run, start: Start) -> dict[str, Any]:
    """Train from where the run stands to the end; returns what the result says of the rollouts."""
    loggers = make_loggers(run.finetune.loggers, run.out, run.recipe)
    selected, store = _open_data(run)
    held_out = _hold_out(run, selected, store)
    record = record_of(run.out, run.finetune, selected.trained.groups_P, start.step)
    module = StudentModule(
        student := _load_student(run, start.checkpoint if start.step else None, selected),
        run.objective,
        run.needed,
        run.finetune,
        tails=cached_tails(run.cache, run.needed, student),
        heads=cached_heads(run.cache, run.needed, student),
        limits=None if run.needed.shown else run.limits,  # drift under other prompts means nothing
        held_out=held_out,
        accuracy=run.accuracy,
        start=start,
        privacy_key=record.key if record else 0,
    )
    _make_room(run.out, start.step)
    index = selected.trained
    repeated = few_rollouts(run.finetune.batch_sequences, len(index.row_P))
    _say([*warnings_of(run.objective), *cache_remarks(run.cache, run.needed), *repeated], selected.notes)
    log.info("training on %d rollouts, steps %d to %d", len(index.row_P), start.step + 1, run.finetune.steps)
    data = CacheData(store, index, run.finetune, start.step, record.key if record else None)
    run_trainer(run.out, run.finetune, module, data, _callbacks(run), loggers)
    said = {"rollouts_left_out": index.num_left_out, "notes": selected.notes + _changes(store)}
    report(said)
    return said


def _changes(store: ShardStore) -> tuple[str, ...]:
    """What happened to the cache while all of it was in memory; a shard that is read again stops the run."""
    changed = store.changed()
    if not changed:
        return ()
    line = (
        f"{changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} changed during training, "
        "which had read and checked them before; the student is of the cache as it was"
    )
    _say([line], ())
    return (line,)


def _say(warnings_found: Sequence[str], notes: Sequence[str]) -> None:
    if is_first_rank():
        for line in warnings_found:
            log.warning("%s", line)
        for line in notes:
            log.info("%s", line)


def _hold_out(run: _Run, selected: SelectedRollouts, store: ShardStore) -> HeldOut | None:
    if selected.held_out is None:
        return None
    objective = held_out_objective(run.objective, run.needed)
    needed, width = needs_on(objective, run.cache), row_tokens(selected.held_out, run.finetune)
    return HeldOut(selected.held_out, store, objective, needed, run.finetune.micro_batch_tokens, width)


def _make_room(out: Path, done: int) -> None:
    """Make the folder of the run, and drop metrics that the resumed run makes again."""
    if not is_first_rank():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        keep_metrics(out / "metrics.csv", done)
        remove_leftovers(out / "checkpoints")
    except OSError as error:
        raise output_error(error, out / "metrics.csv") from error


@doing("train: reading the cache")
def _open_data(run: _Run) -> tuple[SelectedRollouts, ShardStore]:
    signals, topk = run.needed.signals, run.needed.topk
    limit = int(run.finetune.shuffle_gib * GIB)
    shown = next(iter(run.needed.shown), None)
    reading = FirstReading(run.cache, signals, topk, limit, shown, run.needed.hidden)
    held_out, width = run.finetune.held_out, _id_limit(run)
    selected = select_rollouts(run.cache, run.objective, run.needed, held_out, reading, width)
    index = selected.trained
    for some in (index, selected.held_out) if selected.held_out else (index,):
        check_lengths(some, run.finetune.micro_batch_tokens)
    make_plan(index, run.finetune, 0, run.finetune.devices * run.finetune.nodes)
    if index.num_left_out:
        log.info("%d rollouts have no trained token and are left out", index.num_left_out)
    return selected, reading.store(index)


def _id_limit(run: _Run) -> int | None:
    """Width of a student that learns the answers of a wider teacher, which may have drawn an id beyond it."""
    width = model_limits(run.student).vocabulary_size
    manifest = run.cache.manifest
    return width if manifest.origin == "teacher" and manifest.vocabulary_size > width else None


@doing("train: loading the student")
def _load_student(run: _Run, checkpoint: Path | None, selected: SelectedRollouts) -> PreTrainedModel:
    model = load_student(run.student, run.finetune, checkpoint)
    if checkpoint is None and not is_adapted(model):
        check_names(model, run.student)
    check_head(model)
    check_attention(model)
    indexes = [index for index in (selected.trained, selected.held_out) if index is not None]
    longest = max(int(index.lengths_P.max()) for index in indexes)
    width = model.get_output_embeddings().weight.shape[0]
    if run.cache.manifest.vocabulary_size > width and _id_limit(run) is None:
        refuse_ids_beyond(run.cache, width, run.student.path)
    if longest > context_length_of(model):
        raise TrainingError(
            f"the longest rollout has {longest} tokens, the context of {run.student.path} holds "
            f"{context_length_of(model)}; roll out with a smaller max_tokens"
        )
    if run.finetune.layout == "packed":
        check_packing(model)
    if run.finetune.router_loss is not None:
        check_experts(model)
    if run.finetune.precision == "bf16-true":
        check_low_memory()
        model.to(torch.bfloat16)
    _say_memory(model, run, longest)
    if uses_gpu(run.finetune) and not use_causal_attention(model):
        log.info("attention of the student is that of transformers, which makes masks of [T, T]")
    prepared = prepare_student(model, gradient_checkpointing=run.finetune.gradient_checkpointing)
    if run.finetune.compile:
        compile_layers(prepared)
    return prepared


def _say_memory(model: PreTrainedModel, run: _Run, longest: int) -> None:
    """What the memory of a device will go to."""
    available = available_memory(run.finetune)
    if available is None or not is_first_rank():
        return
    estimate = estimate_memory(model, run.finetune, longest, cached_sizes(run.cache, run.needed))
    log.log(logging.INFO if estimate.fits(available) else logging.WARNING, "%s", estimate.sentence(available))


def _callbacks(run: _Run) -> list[Callback]:
    """In the order they hear of a step: the row first, then what may end the run, then the checkpoint."""
    return [
        LogSteps(run.out / "metrics.csv"),
        MetricsFile(run.out / "metrics.csv"),
        StopWhenStale(),
        *([KeepBest(run.finetune.best)] if run.finetune.best else []),
        Checkpoints(run.out / "checkpoints", run.student, run.finetune, run.recipe),
        ProgressLine(run.finetune.steps),
        StepDone(),
    ]


def _result(run: _Run, said: Mapping[str, Any]) -> FitResult:
    """Make `out/student`, and say what it is."""
    folder, student = run.out / "checkpoints", run.out / "student"
    last = newest_checkpoint(folder)
    assert last is not None
    best = run.finetune.best
    found = last if best is None else best_checkpoint(folder, last[1], best.metric)
    if is_main():
        with quiet_libraries():
            export(found[0], run.student, run.finetune, student)
        note_exported(folder, found[0])
    rows = read_metrics(run.out / "metrics.csv")
    measured = next((row for row in rows if row["step"] == found[1].step), {})
    stale = [int(row["step"]) for row in rows if row.get("stale")]
    return FitResult(
        student=student,
        steps=last[1].step,
        exported_step=found[1].step,
        metrics={name: value for name, value in measured.items() if not math.isnan(value)},
        tokens=int(sum(row["tokens"] for row in rows)),
        seconds=math.fsum(row["seconds"] for row in rows),
        stale_steps=tuple(stale),
        rollouts_left_out=said.get("rollouts_left_out"),
        notes=tuple(said.get("notes", ())),
        privacy=privacy_spent(run.out, run.finetune, last[1].step),
        is_main=is_main(),
    )
