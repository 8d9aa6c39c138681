"""Which step of a run is the best so far, and when to wait no longer for a better one."""

from typing import Final

from lightopd.schemas.base import StrictModel
from lightopd.schemas.finetune import BestConfig

HIGHER_IS_BETTER: Final = ("avg_at_k",)


class Best(StrictModel):
    """The best measurement of a run, as checkpoints keep it."""

    metric: str
    """What was measured: a column of `metrics.csv`."""
    step: int
    """Optimiser steps done when it was best."""
    value: float
    """The measurement."""
    waited: int = 0
    """Measurements since, none of them better."""


def updated_best(best: Best | None, config: BestConfig, step: int, value: float) -> Best:
    """The best after one more measurement; of equal ones the first."""
    if best is None or best.metric != config.metric or _is_better(config.metric, value, best.value):
        return Best(metric=config.metric, step=step, value=value)
    return best.model_copy(update={"waited": best.waited + 1})


def is_over(best: Best | None, config: BestConfig | None) -> bool:
    """Whether so many measurements in a row were no better that training ends."""
    if best is None or config is None or config.patience is None or best.metric != config.metric:
        return False
    return best.waited >= config.patience


def _is_better(metric: str, value: float, than: float) -> bool:
    return value > than if metric in HIGHER_IS_BETTER else value < than
