"""Lightning loggers beside metrics.csv: each shows every step once, however often the run was killed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from pydantic import JsonValue

from lightopd.errors import ConfigError
from lightopd.schemas.base import canonical_hash
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.module import StudentModule


def make_loggers(names: Sequence[str], out: Path, recipe: Mapping[str, JsonValue]) -> list[Logger]:
    """The loggers of the settings; a resumed run writes into the same records.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    check_loggers(names)
    loggers: list[Logger] = []
    if "tensorboard" in names:  # purged: what an earlier process wrote, as `LogSteps` says all of it again
        loggers.append(TensorBoardLogger(out, name="tensorboard", version="", purge_step=1))
    if "wandb" in names:
        identity = canonical_hash([str(out.resolve()), dict(recipe)])[:16]
        loggers.append(StepwiseWandb(name=out.name, save_dir=out, version=identity, resume="allow"))
    return loggers


def check_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        ConfigError: names the package.
    """
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in names:
        if not any(importlib.util.find_spec(package) for package in packages[name]):
            raise ConfigError(
                f"logger {name} needs the package {packages[name][0]}, which is not installed; "
                f"pip install {packages[name][0]}, or take {name} out of loggers"
            )


class StepwiseWandb(WandbLogger):  # type: ignore[misc]
    """A wandb logger whose steps are those of the run, so that none is there twice."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a step, unless the record of a resumed run has it: wandb takes steps in order only."""
        run = self.experiment
        if step is None or step >= run.starting_step:
            run.log({**metrics, "trainer/global_step": step}, step=step)

    def finish(self, exit_code: int) -> None:
        """Close the run, where one was begun: reading it would begin it."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)


class LogSteps(Callback):  # type: ignore[misc]
    """Hands every step to the loggers, and first those of `metrics.csv` that were made before.

    A killed process loses what its loggers had not written yet, steps before the last checkpoint among them.
    """

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics

    def on_train_start(self, trainer: Trainer, module: StudentModule) -> None:
        """Say the steps before this process again."""
        for row in read_metrics(self.metrics) if trainer.loggers and trainer.is_global_zero else ():
            _log(trainer, row)

    def on_train_batch_end(self, trainer: Trainer, module: StudentModule, *_: Any) -> None:
        """Log the step's numbers."""
        if trainer.is_global_zero:
            _log(trainer, module.metrics)

    def on_fit_end(self, trainer: Trainer, module: StudentModule) -> None:
        """Close wandb's run, which the next run of this process would write into."""
        _finish(trainer, exit_code=0)

    def on_exception(self, trainer: Trainer, module: StudentModule, exception: BaseException) -> None:
        """Close wandb's run as one that failed."""
        _finish(trainer, exit_code=1)


def _log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """A number that was not measured at this step is left out: a chart would show it as a fault."""
    measured = {name: value for name, value in metrics.items() if name != "step" and value == value}
    for logger in trainer.loggers:
        logger.log_metrics(measured, step=int(metrics["step"]))


def _finish(trainer: Trainer, exit_code: int) -> None:
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, StepwiseWandb):
            logger.finish(exit_code)
