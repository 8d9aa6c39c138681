"""What a training would refuse of its settings, refused before anything is paid for; no weights are read.

Apart from the other refusals, so that stages that train nothing do not wait for Lightning to be read.
"""

import importlib.util

from lightopd.errors import ConfigError
from lightopd.objectives.requirements import needs
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.data.plan import check_share
from lightopd.training.distributed.launch import must_start
from lightopd.training.distributed.strategies import check_strategy
from lightopd.training.jumps import check_held_out_scores
from lightopd.training.loggers import check_loggers
from lightopd.training.privacy.limits import check_privacy


def check_training(finetune: FinetuneConfig, objective: ObjectiveConfig, *, asks_student: bool) -> None:
    """Refuse a batch, devices, strategy, loggers and adapters that cannot work here.

    Raises:
        ConfigError: see the message.
    """
    check_share(finetune.batch_sequences, finetune.devices * finetune.nodes)
    must_start(finetune)
    check_strategy(finetune, asks_student=asks_student)
    check_held_out_scores(objective, finetune)
    check_privacy(objective, needs(objective), finetune)
    check_loggers(finetune.loggers)
    if finetune.adapter is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("adapter needs peft, which is not installed: pip install 'lightopd[adapters]'")
