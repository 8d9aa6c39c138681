"""How the devices of a run share its work: Lightning's strategies, by the names that settings use."""

import contextlib
from collections.abc import Iterator

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import FinetuneConfig


@contextlib.contextmanager
def refusals_told(finetune: FinetuneConfig) -> Iterator[None]:
    """Turn Lightning's refusal of devices, nodes or strategy into the user's words.

    Raises:
        ConfigError: no such strategy, fewer devices than asked for, or a launcher that disagrees.
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
    # Its way to requeue a job keeps a checkpoint of its own; here the same command goes on from the run's.
    return [SLURMEnvironment(auto_requeue=False)]
