"""AdamW and its learning rate."""

import importlib.util
import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import OptimizerConfig
from lightopd.training.distributed.fsdp import whole

SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, *, low_memory: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the parameters that require gradients, with weight decay on those with two or more axes.

    Args:
        model: what is trained.
        config: of the optimiser.
        low_memory: torchao's AdamW, for bfloat16 weights: moments take 8 bits, and an updated weight is
            rounded at random, to itself in the mean. A rate of 2e-6 would else move no weight.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if low_memory:
        from torchao.optim import AdamW8bit

        groups = [group for group in groups if group["params"]]
        options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        small: torch.optim.Optimizer = AdamW8bit(groups, **options, bf16_stochastic_round=True)
        return small
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
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def check_low_memory() -> None:
    """Refuse 8-bit moments where nothing keeps them.

    Raises:
        ConfigError: torchao is missing.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "precision bf16-true needs torchao, which is not installed: pip install 'lightopd[lowmem]'"
        )


def narrow_moments(optimizer: torch.optim.Optimizer) -> None:
    """Bring moments that a checkpoint gave in float32 into the optimiser's format, which holds them."""
    if not hasattr(optimizer, "_new_buffer"):
        return
    for parameter, state in optimizer.state.items():
        for name, is_signed in SIGNED.items():
            wide = state[name]
            state[name] = optimizer._new_buffer(parameter, is_signed)
            state[name].copy_(wide)


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale the gradients down to a global norm of at most `largest`; returns the norm before, a scalar."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return whole(nn.utils.clip_grad_norm_(trained, math.inf if largest is None else largest))
