"""Lightning loggers beside metrics.csv."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from pydantic import JsonValue

from lightopd.errors import ConfigError
from lightopd.schemas.base import canonical_hash


def make_loggers(names: Sequence[str], out: Path, recipe: dict[str, JsonValue], done: int) -> list[Logger]:
    """The loggers asked for; a resumed run goes on in the same records after step `done`.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in names:
        if not any(importlib.util.find_spec(package) for package in packages[name]):
            raise ConfigError(
                f"logger {name} needs the package {packages[name][0]}, which is not installed; "
                f"pip install {packages[name][0]}, or take {name} out of loggers"
            )
    loggers: list[Logger] = []
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(out, name="tensorboard", version="", purge_step=done + 1))
    if "wandb" in names:
        identity = canonical_hash([str(out.resolve()), recipe])[:16]
        loggers.append(WandbLogger(name=out.name, save_dir=out, version=identity, resume="allow"))
    return loggers
