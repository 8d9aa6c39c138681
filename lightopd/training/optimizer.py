"""AdamW and its learning rate."""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightopd.schemas.finetune import OptimizerConfig
from lightopd.training.distributed.fsdp import whole


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the parameters that require gradients, with weight decay on those with two or more axes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        # One kernel for a group in place of one for each operation; on a CPU results would move by rounding.
        fused=True if all(parameter.is_cuda for parameter in trained) else None,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step `step`, 0 to `steps` - 1, of a run or of one round of several.

    Warm-up rises linearly and reaches the peak with step `warmup_steps` - 1; `linear` and `cosine` then fall
    and would be zero at step `steps`, so that no step is lost to a rate of zero.
    """
    step += config.steps_before
    steps = config.steps_in_all or steps
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * progress)) / 2
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradients down to a global norm of at most `largest`; returns the norm before, a scalar."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return whole(nn.utils.clip_grad_norm_(trained, math.inf if largest is None else largest))
