"""Fit a student to a cache: from settings and folders to a trained Hugging Face folder.

    out/metrics.csv   out/checkpoints/step-NNNNNN/   out/student/

Called again with the same settings it goes on from the newest whole checkpoint, or finds everything done.
"""

import contextlib
import importlib.util
import logging
import math
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from pydantic import JsonValue
from transformers import PreTrainedModel

from lightopd.cache.shards import output_error
from lightopd.cache.store import Cache, content_id
from lightopd.engines.models import check_head, context_length_of, load_model
from lightopd.errors import CacheError, ConfigError, TrainingError
from lightopd.lineage import fingerprint_model
from lightopd.objectives.needs import needs
from lightopd.objectives.parts import Needs
from lightopd.objectives.validate import check_cache
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import FinetuneConfig, ModelConfig, StalenessLimits
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.training.callbacks import Checkpoints, Interruption, MetricsFile, Progress
from lightopd.training.checkpoint import check_same_run, export_student, newest_checkpoint
from lightopd.training.data import CacheData
from lightopd.training.metrics import keep_metrics, read_metrics
from lightopd.training.module import StudentModule, prepare_student
from lightopd.training.plan import GIB, CacheIndex, make_plan
from lightopd.training.shards import ShardStore, check_shards, index_cache

log = logging.getLogger(__name__)

DECIDES_NOTHING = (
    "steps",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "accelerator",
    "devices",
    "nodes",
    "strategy",
    "loader_workers",
    "checkpoint_every",
    "keep_checkpoints",
    "loggers",
)
"""Settings that may change between a checkpoint and the run that goes on from it: they move results by
rounding at most (`steps` counts under a schedule that depends on it)."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a finished run says."""

    student: Path
    """Hugging Face folder of the trained student."""
    steps: int
    """Optimiser steps done, over all resumptions."""
    metrics: dict[str, float]
    """Numbers of the last step; empty when metrics.csv was removed."""
    tokens: int
    """Prompt and response tokens trained on, padding left out."""
    seconds: float
    """Time spent in steps, over all resumptions."""
    first_stale_step: int | None
    """The first step that passed a staleness limit."""
    rollouts_left_out: int | None
    """Rollouts without a trained token; None when the run was finished before."""
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
    asked: Needs
    recipe: dict[str, JsonValue]


def fit(
    cache: Cache,
    student: ModelConfig,
    out: Path,
    finetune: FinetuneConfig,
    objective: ObjectiveConfig,
    *,
    staleness: StalenessLimits | None = None,
) -> FitResult:
    """Train `student` against `cache` and write the trained student to `out/student`.

    The weights are trained and stored in float32, whatever `student.dtype` says. Lineage is the caller's
    affair.

    Args:
        cache: complete, with the signals that the objective asks for.
        student: where the run begins; a checkpoint in `out` goes before it.
        out: folder of the run.
        finetune: steps, batch, optimiser, devices.
        objective: the loss.
        staleness: limits of the drift from the student at rollout; None for answers of a teacher.

    Raises:
        ConfigError: a logger's package is missing, or the batch cannot be dealt to the devices.
        CacheError: a signal is missing, a shard is damaged or changes during the run.
        TrainingError: a checkpoint of another run, a rollout that does not fit, a loss that is not finite.
        OutputError: no space or no permission; the last checkpoint is kept.
        KeyboardInterrupt: after a clean stop; the last checkpoint is kept.
    """
    asked = needs(objective)
    _check_supported(objective, asked)
    check_cache(objective, cache)
    _check_origin(cache, asked)
    recipe = _recipe(cache, student, finetune, objective, asked)
    run = _Run(cache, student, out, finetune, objective, staleness, asked, recipe)
    found = newest_checkpoint(out / "checkpoints")
    if found is not None:
        check_same_run(*found, recipe)
    done = 0 if found is None else found[1].step
    if done > finetune.steps:
        raise TrainingError(
            f"{out} has a checkpoint of step {done}, and steps is {finetune.steps}; set steps to {done} or "
            "more, or choose another out folder"
        )
    left_out = _train(run, found[0] if found else None, done) if done < finetune.steps else None
    is_main = rank_zero_only.rank == 0
    if is_main:
        _export(out)
    return _result(out, finetune.steps, left_out, is_main)


def _train(run: _Run, checkpoint: Path | None, done: int) -> int:
    """Train from step `done` to the end; returns how many rollouts have nothing to train on."""
    loggers = _loggers(run, done)
    index, data = _open_data(run, done)
    module = StudentModule(
        _load_student(run, checkpoint, index),
        run.objective,
        run.asked.supports,
        run.finetune,
        limits=run.limits,
        step=done,
        checkpoint=checkpoint,
    )
    _make_room(run.out, done)
    log.info("training on %d rollouts, steps %d to %d", len(index.row_P), done + 1, run.finetune.steps)
    _fit_quietly(run, module, data, loggers)
    return index.num_left_out


def _make_room(out: Path, done: int) -> None:
    """Make the folder of the run, and drop metrics that the resumed run makes again."""
    if rank_zero_only.rank != 0:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        keep_metrics(out / "metrics.csv", done)
    except OSError as error:
        raise output_error(error, out / "metrics.csv", 0) from error


def _open_data(run: _Run, done: int) -> tuple[CacheIndex, CacheData]:
    signals, topk = run.asked.signals, run.asked.topk
    stamps = check_shards(run.cache, signals)
    index = index_cache(run.cache, signals, topk)
    make_plan(index, run.finetune, 0, run.finetune.devices * run.finetune.nodes)
    if index.num_left_out:
        log.info("%d rollouts have no trained token and are left out", index.num_left_out)
    limit = int(run.finetune.shuffle_gib * GIB)
    store = ShardStore(run.cache, signals, topk, stamps, index.bytes_S, limit)
    return index, CacheData(store, index, run.finetune, done)


def _load_student(run: _Run, checkpoint: Path | None, index: CacheIndex) -> PreTrainedModel:
    changes: dict[str, Any] = {"dtype": "float32"}
    if checkpoint is not None:
        changes |= {"path": str(checkpoint), "revision": None, "adapter": None}
    model = load_model(run.student.model_copy(update=changes), "cpu")
    check_head(model)
    width, longest = model.get_output_embeddings().weight.shape[0], int(index.lengths_P.max())
    if run.cache.manifest.vocabulary_size > width:
        raise TrainingError(
            f"the cache has token ids up to {run.cache.manifest.vocabulary_size - 1}, {run.student.path} has "
            f"{width} outputs; train the student that sampled the cache"
        )
    if longest > context_length_of(model):
        raise TrainingError(
            f"the longest rollout has {longest} tokens, the context of {run.student.path} holds "
            f"{context_length_of(model)}; roll out with a smaller max_tokens"
        )
    return prepare_student(model, gradient_checkpointing=run.finetune.gradient_checkpointing)


def _fit_quietly(run: _Run, module: StudentModule, data: CacheData, loggers: list[Logger]) -> None:
    """Run Lightning's trainer, with its banner and hints kept off the screen."""
    interruption = Interruption()
    callbacks = [
        MetricsFile(run.out / "metrics.csv"),
        Checkpoints(run.out / "checkpoints", run.student, run.finetune, run.recipe),
        Progress(run.finetune.steps),
        interruption,
    ]
    on_interrupt = signal.getsignal(signal.SIGINT)
    with _quiet_libraries():
        trainer = _make_trainer(run, callbacks, loggers)
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit:
            if not interruption.was_pressed:
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None


def _make_trainer(run: _Run, callbacks: list[Any], loggers: list[Logger]) -> Trainer:
    finetune = run.finetune
    has_gpu = torch.cuda.is_available()
    return Trainer(
        accelerator={"auto": "gpu" if has_gpu else "cpu"}.get(finetune.accelerator, finetune.accelerator),
        devices=finetune.devices,
        num_nodes=finetune.nodes,
        strategy=finetune.strategy,
        precision=finetune.precision,
        max_epochs=1,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=run.out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def _recipe(
    cache: Cache, student: ModelConfig, finetune: FinetuneConfig, objective: ObjectiveConfig, asked: Needs
) -> dict[str, JsonValue]:
    """Everything that decides the trained weights, by dotted name."""
    decisive = {*FinetuneConfig.model_fields} - {*DECIDES_NOTHING}
    if finetune.optimizer.schedule != "constant":
        decisive.add("steps")
    return {
        "cache": content_id(cache, asked.signals),
        "student": fingerprint_model(student).identity,
        **_flat(finetune.model_dump(mode="json", include=decisive)),
        **_flat(objective.model_dump(mode="json"), "objective."),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, JsonValue]:
    flat: dict[str, JsonValue] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _check_supported(objective: ObjectiveConfig, asked: Needs) -> None:
    """Refuse what this trainer does not do, rather than train on another loss than was asked for."""
    unsupported = {
        "select, rows, average_over, or a part that reads the whole cache": asked.prepared,
        "rollout weights over the step": asked.statistics,
        "pairs of rollouts in one micro-batch": asked.together,
        "curriculum or balance": asked.state,
        "jump": objective.jump is not None,
        "teacher rewards": bool(asked.answers),
    }
    found = [name for name, is_asked in unsupported.items() if is_asked]
    if found:
        raise ConfigError(f"the trainer does not support this objective: {'; '.join(found)}; leave it out")


def _check_origin(cache: Cache, asked: Needs) -> None:
    if "ref_logprobs" in asked.columns and cache.manifest.origin != "student":
        raise CacheError(
            f"the objective compares the student with itself at rollout, and the responses of {cache.path} "
            f"come from: {cache.manifest.origin}; choose an objective without ratio, or roll out again"
        )


def _loggers(run: _Run, done: int) -> list[Logger]:
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in run.finetune.loggers:
        if not any(importlib.util.find_spec(package) for package in packages[name]):
            raise ConfigError(
                f"logger {name} needs the package {packages[name][0]}, which is not installed; "
                f"pip install {packages[name][0]}, or take {name} out of loggers"
            )
    loggers: list[Logger] = []
    if "tensorboard" in run.finetune.loggers:
        loggers.append(TensorBoardLogger(run.out, name="tensorboard", version="", purge_step=done + 1))
    if "wandb" in run.finetune.loggers:
        identity = canonical_hash([str(run.out.resolve()), run.recipe])[:16]
        loggers.append(WandbLogger(name=run.out.name, save_dir=run.out, version=identity, resume="allow"))
    return loggers


def _export(out: Path) -> None:
    found = newest_checkpoint(out / "checkpoints")
    assert found is not None
    export_student(found[0], out / "student")


def _result(out: Path, steps: int, left_out: int | None, is_main: bool) -> FitResult:
    rows = read_metrics(out / "metrics.csv")
    stale = [int(row["step"]) for row in rows if row.get("stale")]
    return FitResult(
        student=out / "student",
        steps=steps,
        metrics=rows[-1] if rows else {},
        tokens=int(sum(row["tokens"] for row in rows)),
        seconds=math.fsum(row["seconds"] for row in rows),
        first_stale_step=stale[0] if stale else None,
        rollouts_left_out=left_out,
        is_main=is_main,
    )


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hints, banners and bars of libraries off; what matters to the user is said by this package."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    had_bars = transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.|lightning_fabric\.")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if had_bars:
                transformers.logging.enable_progress_bar()
