"""What differential privacy does not go with, refused before the first step.

The bound is one of a sum over prompts, each of which changes it by no more than the clip: so a rollout's
gradient may depend on nothing but the rollout and the weights.
"""

import importlib.util

from lightopd.errors import ConfigError
from lightopd.objectives.base.part import Needs
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig


def check_privacy(objective: ObjectiveConfig, needed: Needs, finetune: FinetuneConfig) -> None:
    """Refuse losses and settings under which one prompt reaches further than its own gradient.

    Raises:
        ConfigError: names each of them, and what to do.
    """
    if finetune.privacy is None:
        return
    if importlib.util.find_spec("opacus") is None:
        raise ConfigError("privacy needs opacus, which is not installed: pip install 'lightopd[dp]'")
    reasons = [*_of_objective(objective, needed), *_of_settings(finetune)]
    if reasons:
        raise ConfigError(f"privacy does not go with {'; nor with '.join(reasons)}")


def _of_objective(objective: ObjectiveConfig, needed: Needs) -> list[str]:
    looks_across = {
        "an objective that selects rollouts (select)": bool(objective.select),
        "an objective that compares the rollouts of a prompt": needed.groups or needed.together,
        "an objective that reads the whole cache first (rows, average_over, rollout weights, limits)": (
            needed.prepared and not (objective.select or needed.groups)
        ),
        "a weight over the rollouts of a step": needed.step_sums,
        "a curriculum or balance that is moved by the rollouts of a step": needed.state,
        "a jump that is scored on rollouts held out": objective.jump is not None,
        "reduce: token_mean, which divides by the tokens of the step's other rollouts": any(
            term.reduce == "token_mean" for term in objective.terms
        ),
    }
    return [name for name, is_so in looks_across.items() if is_so]


def _of_settings(finetune: FinetuneConfig) -> list[str]:
    found = {
        "more than one device": finetune.devices * finetune.nodes > 1,
        "strategy fsdp": finetune.strategy == "fsdp",
        "layout packed, since every rollout is a micro-batch of its own": finetune.layout == "packed",
        "precision bf16-true, which would round the noise": finetune.precision == "bf16-true",
        "router_loss, which is one of the whole step": finetune.router_loss is not None,
        "best, which chooses a student by rollouts that the bound does not cover": finetune.best is not None,
    }
    return [name for name, is_so in found.items() if is_so]
