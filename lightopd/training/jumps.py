"""Jumps along the weights' own update, kept while a validation score improves (arXiv 2605.11739).

The loss does not change. After optimiser steps 1, 2, 4, 8, ... the trainer tries W + 2 k (W - anchor) for
k = 1, 2, ..., where the anchor is what the weights were after the jump before, or at the start.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.objectives.weights import WeightJump
from lightopd.training.distributed.strategies import FSDP
from lightopd.training.weight_files.tensor_shards import JUMP_ANCHOR

MOVED = ("attn", "attention", "mlp", "feed_forward", "experts")
"""A matrix whose name holds one of these moves; embeddings, norms and the output layer stay."""


@dataclass(frozen=True, slots=True)
class Jump:
    """What a search along the update found."""

    accepted: int
    """k of the weights that are kept; 0 when no candidate improved the score."""
    scores: tuple[float, ...]
    """Score without a jump, then of each candidate tried."""


class WeightJumps:
    """The jumps of a run; its one hook comes after every optimiser step.

    Args:
        config: number of candidates.
        student: whole on this device.
        checkpoint: folder whose anchor is resumed; without one, or None, the anchor is the student now.
    """

    def __init__(self, config: WeightJump, student: nn.Module, checkpoint: Path | None) -> None:
        self.config = config
        self._parameters = dict(student.named_parameters())
        file = None if checkpoint is None else checkpoint / f"{JUMP_ANCHOR}.safetensors"
        self.anchor = load_file(file) if file is not None and file.is_file() else self._anchor_now()

    def after_step(self, steps_done: int, score: Callable[[], float]) -> dict[str, float]:
        """Jump where one is due; returns the metric `jump`: k of the weights that are kept."""
        if not is_jump_step(steps_done):
            return {"jump": 0}
        found = jump(self.config, self._parameters, self.anchor, score)
        self.anchor = self._anchor_now()
        return {"jump": found.accepted}

    def _anchor_now(self) -> dict[str, Tensor]:
        # On the host: it is read once in many steps, and is as large as most of the model.
        return {name: tensor.cpu() for name, tensor in anchor_of(self._parameters).items()}


def check_held_out_scores(objective: ObjectiveConfig, finetune: FinetuneConfig) -> None:
    """Refuse jumps and choices of exposure that cannot be made, or not be scored.

    Raises:
        ConfigError: names the setting to change.
    """
    if objective.exposure is not None and not finetune.held_out:
        raise ConfigError(
            "the objective chooses an exposure by the loss on held-out rollouts, and held_out is 0; "
            "set held_out to 50 or more"
        )
    if objective.jump is None:
        return
    if finetune.adapter is not None:
        raise ConfigError(
            "the objective jumps along the update of whole matrices, and adapter trains factors of one; "
            "leave out adapter, or objective.jump"
        )
    if not finetune.held_out:
        raise ConfigError(
            "the objective jumps while a score on held-out rollouts improves, and held_out is 0; "
            "set held_out to 50 or more"
        )
    if finetune.strategy == FSDP:
        raise ConfigError("the objective jumps, which needs whole weights on a device; set strategy to ddp")


def is_jump_step(steps_done: int) -> bool:
    """True after 1, 2, 4, 8, ... optimiser steps."""
    return steps_done > 0 and steps_done & (steps_done - 1) == 0


def movable(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The attention and feed-forward matrices among a model's named parameters."""
    return {
        name: tensor
        for name, tensor in parameters.items()
        if tensor.ndim >= 2 and any(part in name for part in MOVED)
    }


def anchor_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the movable parameters: the anchor at the start, and after every jump."""
    return {name: tensor.detach().clone() for name, tensor in movable(parameters).items()}


@torch.no_grad()
def jump(
    config: WeightJump,
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    score: Callable[[], float],
) -> Jump:
    """Move the parameters in place to the best candidate.

    The search ends at the first candidate that does not improve on the best score so far. Without an accepted
    candidate the parameters are bit for bit what they were. The new anchor is `anchor_of(parameters)`
    afterwards, whatever was accepted; the optimiser's state is not touched.

    Args:
        config: number of candidates.
        parameters: named parameters of the student, moved in place; candidates are computed in float32.
        anchor: movable parameters at the last anchor.
        score: of the current weights, higher is better; such as accuracy on 50 held-out prompts, or minus the
            loss on held-out rollouts.
    """
    moved = movable(parameters)
    start = anchor_of(parameters)
    scores = [score()]
    best, accepted = scores[0], 0
    for k in range(1, config.max_candidates + 1):
        _place(moved, start, anchor, k)
        scores.append(score())
        if not scores[-1] > best:
            break
        best, accepted = scores[-1], k
    _place(moved, start, anchor, accepted)
    return Jump(accepted, tuple(scores))


def _place(
    moved: Mapping[str, Tensor], start: Mapping[str, Tensor], anchor: Mapping[str, Tensor], k: int
) -> None:
    for name, tensor in moved.items():
        if k == 0:
            tensor.copy_(start[name])
            continue
        step = start[name].float() - anchor[name].to(tensor.device).float()
        tensor.copy_(start[name].float() + 2 * k * step)
