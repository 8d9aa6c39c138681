"""How the devices of a run share its work: Lightning's strategies, by the names that settings use."""

import contextlib
from collections.abc import Iterator

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import FinetuneConfig

FSDP = "fsdp"
"""Name of the strategy that shards weights, gradients and moments over all devices."""


def uses_gpu(finetune: FinetuneConfig) -> bool:
    """Whether a run trains on GPUs."""
    return finetune.accelerator != "cpu" and torch.cuda.is_available()


@contextlib.contextmanager
def refusals_told(finetune: FinetuneConfig) -> Iterator[None]:
    """Turn Lightning's refusal of devices, nodes or strategy into the user's words.

    Raises:
        ConfigError: no such strategy, fewer devices than requested, or a launcher that disagrees.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"accelerator {finetune.accelerator}, devices {finetune.devices}, nodes {finetune.nodes} and "
            f"strategy {finetune.strategy} do not work here: {reason}"
        ) from error


def environments() -> list[SLURMEnvironment]:
    """What the trainer is told of the machines; Lightning finds out the rest by itself."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    # Its way to requeue a job keeps a checkpoint of its own; here the same command resumes from the run's.
    return [SLURMEnvironment(auto_requeue=False)]


def check_strategy(finetune: FinetuneConfig, *, asks_student: bool = False) -> None:
    """Refuse what a strategy cannot do.

    Args:
        asks_student: whether the student answers prompts during training.

    Raises:
        ConfigError: the student has to answer from shares of weights.
    """
    if finetune.strategy == FSDP and asks_student:
        raise ConfigError(
            "accuracy during training needs whole weights on a device; set strategy to ddp, or leave out "
            "accuracy and use lightopd eval"
        )


def make_strategy(finetune: FinetuneConfig) -> str | Strategy:
    """What the trainer is given for the name in the settings.

    Lightning's own `fsdp` is the older FSDP1; here it is FSDP2, which Lightning leaves the module to apply.
    """
    if finetune.strategy != FSDP:
        return finetune.strategy
    return ModelParallelStrategy(finetune.devices * finetune.nodes, 1, save_distributed_checkpoint=False)
