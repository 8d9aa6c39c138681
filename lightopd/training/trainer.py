"""Lightning's trainer, with the settings of a run, and kept quiet."""

import contextlib
import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger

from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.callbacks import Interruption
from lightopd.training.distributed.strategies import environments, make_strategy, refusals_told
from lightopd.training.module import StudentModule


def run_trainer(
    out: Path,
    finetune: FinetuneConfig,
    module: StudentModule,
    data: LightningDataModule,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
) -> None:
    """Train to the end, with the library's banner and hints kept off the screen.

    Raises:
        ConfigError: accelerator, devices, nodes or strategy do not work here.
        KeyboardInterrupt: after Ctrl-C, which Lightning turns into an exit of the process.
    """
    interruption = Interruption()
    on_interrupt = signal.getsignal(signal.SIGINT)
    with quiet_libraries():
        trainer = _make_trainer(out, finetune, [*callbacks, interruption], loggers)
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit:
            if not interruption.was_pressed:
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None


def _make_trainer(
    out: Path, finetune: FinetuneConfig, callbacks: Sequence[Callback], loggers: Sequence[Logger]
) -> Trainer:
    has_gpu = torch.cuda.is_available()
    with refusals_told(finetune):
        return Trainer(
            accelerator={"auto": "gpu" if has_gpu else "cpu"}.get(finetune.accelerator, finetune.accelerator),
            devices=finetune.devices,
            num_nodes=finetune.nodes,
            strategy=make_strategy(finetune),
            plugins=environments(),
            # Lightning's own bf16-true makes bfloat16 the default of every new tensor, the loss's too.
            precision="32-true" if finetune.precision == "bf16-true" else finetune.precision,
            max_epochs=1,
            logger=list(loggers) or False,
            callbacks=list(callbacks),
            default_root_dir=out,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hints, banners and bars of libraries off; what matters to the user is said by this package."""
    # A layer that does not compile to one graph becomes several, which torch tells in twenty lines each time.
    # torchao names the kernels of GPUs that are not here.
    names = ("lightning.pytorch", "lightning.fabric", "torch._dynamo.exc", "torchao")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    had_bars = transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.|lightning_fabric\.")
        warnings.filterwarnings("ignore", message="Error detected in", module=r"torch\.autograd\.graph")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if had_bars:
                transformers.logging.enable_progress_bar()
