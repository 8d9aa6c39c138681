"""Jumps along the weights' own update, kept while a validation score improves (arXiv 2605.11739).

The loss does not change. At optimiser steps 1, 2, 4, 8, ... the trainer calls `jump` with the weights of the
last anchor; candidates are W + 2 k (W - anchor) for k = 1, 2, ....
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightopd.schemas.objectives.weights import WeightJump

MOVED = ("attn", "attention", "mlp", "feed_forward", "experts")
"""A matrix whose name holds one of these moves; embeddings, norms and the output layer stay."""


@dataclass(frozen=True, slots=True)
class Jump:
    """What a search along the update found."""

    accepted: int
    """k of the weights that are kept; 0 when no candidate improved the score."""
    scores: tuple[float, ...]
    """Score without a jump, then of each candidate tried."""


def is_jump_step(config: WeightJump, steps_done: int) -> bool:
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
