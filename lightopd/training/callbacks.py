"""What happens after a step: its row in metrics.csv, a checkpoint when one is due, a progress line."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from pydantic import JsonValue

from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import BestConfig, FinetuneConfig
from lightopd.stopping import stops_wait
from lightopd.telling import LIVE, duration
from lightopd.training.checkpoints.checkpoint import TrainerState, checkpoint_path, prune_checkpoints
from lightopd.training.checkpoints.save import save_checkpoint
from lightopd.training.measures.best import is_over, updated_best
from lightopd.training.measures.metrics_file import append_metrics
from lightopd.training.module import StudentModule

log = logging.getLogger(__name__)

PROGRESS_S = 10.0
"""Seconds between progress lines of a log, at least."""
REDRAW_S = 0.25
"""Seconds between progress lines on a terminal, where one takes the place of the other, at least."""


class MetricsFile(Callback):  # type: ignore[misc]
    """Appends every step to metrics.csv."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """One row."""
        if trainer.is_global_zero:
            append_metrics(self.path, module.metrics)


class StopWhenStale(Callback):  # type: ignore[misc]
    """Ends training with the step at which the cache is stale; `Checkpoints` comes after it and saves."""

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """Every rank has the same metrics, so every rank stops."""
        if module.drift.ends_run:
            trainer.should_stop = True


class KeepBest(Callback):  # type: ignore[misc]
    """Notes the best measurement, ends training when no better one comes; `Checkpoints` comes after it."""

    def __init__(self, config: BestConfig) -> None:
        self.config = config

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """Every rank has the same metrics, so every rank finds the same."""
        value = module.metrics[self.config.metric]
        if math.isnan(value):  # not measured at this step
            return
        module.best = updated_best(module.best, self.config, module.step, value)
        if not is_over(module.best, self.config):
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            log.info(
                "%d measurements of %s in a row were no better than %.4g at step %d: training ends",
                module.best.waited,
                self.config.metric,
                module.best.value,
                module.best.step,
            )


class Checkpoints(Callback):  # type: ignore[misc]
    """Saves a checkpoint every `checkpoint_every` steps, after the last one and after the best so far."""

    def __init__(
        self,
        folder: Path,
        student: ModelConfig,
        finetune: FinetuneConfig,
        recipe: dict[str, JsonValue],
    ) -> None:
        self.folder, self.student, self.finetune, self.recipe = folder, student, finetune, recipe

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """Save when one is due, on all ranks together."""
        is_last = module.step == self.finetune.steps or trainer.should_stop
        best_step = module.best.step if module.best else None
        is_due = module.step % self.finetune.checkpoint_every == 0
        if not (is_due or is_last or module.step == best_step):
            return
        self._save(trainer, module)

    def on_exception(self, trainer: Trainer, module: StudentModule, exception: BaseException) -> None:
        """Save the last step of an interrupted run, where its only process stands between two steps."""
        is_alone = trainer.world_size == 1 and isinstance(exception, KeyboardInterrupt)
        if is_alone and module.is_between_steps and not checkpoint_path(self.folder, module.step).exists():
            self._save(trainer, module)

    def _save(self, trainer: Trainer, module: StudentModule) -> None:
        best_step = module.best.step if module.best else None
        module.refuse_broken_weights()
        state = TrainerState(
            step=module.step,
            recipe=self.recipe,
            objective=asdict(module.state),
            is_stale=bool(trainer.should_stop and module.metrics.get("stale")),
            best=module.best,
            num_exceeded=module.drift.num_exceeded,
        )
        optimizer = module.optimizers(use_pl_optimizer=False)
        place = self.folder, module.student, optimizer, self.student, state
        path = save_checkpoint(*place, module.kept_beside())
        if trainer.is_global_zero:
            prune_checkpoints(self.folder, self.finetune.keep_checkpoints, best_step)
            log.info("checkpoint %s", path)
        trainer.strategy.barrier()


class StepDone(Callback):  # type: ignore[misc]
    """The last to hear of a step: all that belongs to it is done, and a single process may be stopped."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._allow_stop: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: Trainer, module: StudentModule) -> None:
        """Let a stop wait for its step; several processes stop at once: each would wait for the others."""
        if trainer.world_size == 1:
            self._allow_stop = self._held.enter_context(stops_wait())

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """Note it, and stop if that was requested."""
        module.is_between_steps = True
        self._allow_stop()

    def on_exception(self, trainer: Trainer, module: StudentModule, exception: BaseException) -> None:
        """Signals act at once again."""
        self._held.close()

    def on_train_end(self, trainer: Trainer, module: StudentModule) -> None:
        """Signals act at once again."""
        self._held.close()


class ProgressLine(Callback):  # type: ignore[misc]
    """A line with time left, loss, gap, w and rate: every ten seconds in a log, redrawn on a terminal."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps = steps
        self.clock = clock
        self._began_s = self._said_s = self._drawn_s = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, module: StudentModule) -> None:
        """Start the clock."""
        self._began_s = self._said_s = self._drawn_s = self.clock()
        self._first_step = module.step

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """Say how far the run is, when it is time to."""
        now_s = self.clock()
        is_due = now_s - self._said_s >= PROGRESS_S
        if not trainer.is_global_zero or not (is_due or now_s - self._drawn_s >= REDRAW_S):
            return
        self._drawn_s = now_s
        self._said_s = now_s if is_due else self._said_s
        left_s = (self.steps - module.step) * (now_s - self._began_s) / (module.step - self._first_step)
        log.log(
            logging.INFO if is_due else logging.DEBUG,
            "step %d/%d, %s left, loss %.4g%s, %.0f tokens/s",
            module.step,
            self.steps,
            duration(left_s),
            module.metrics["loss"],
            drift_words(module.metrics),
            module.metrics["tokens_per_second"],
            extra=LIVE,
        )


def drift_words(metrics: Mapping[str, float]) -> str:
    """`, gap 0.21, w 0.98` for the progress line: nats to the signal, mean ratio to the rollout."""
    measured = {"gap": -metrics.get("log_ratio", math.nan), "w": metrics.get("w_mean", math.nan)}
    return "".join(f", {name} {value:.3g}" for name, value in measured.items() if not math.isnan(value))


class Interruption(Callback):  # type: ignore[misc]
    """Remembers Ctrl-C, which Lightning turns into an exit of the process."""

    def __init__(self) -> None:
        self.was_pressed = False

    def on_exception(self, trainer: Trainer, module: StudentModule, exception: BaseException) -> None:
        """Note the exception that ends the run."""
        self.was_pressed = isinstance(exception, KeyboardInterrupt)
