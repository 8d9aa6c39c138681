"""Rounds: the section of a run file that repeats rollout, precompute and train."""

from typing import Literal

from pydantic import Field

from lightopd.schemas.base import StrictModel


class RoundsConfig(StrictModel):
    """Rounds of rollout, precompute and train, each from the student that the round before it made."""

    steps: int = Field(ge=1)
    """Optimiser steps over all rounds; `train.steps` is the most of one round."""
    prompts_per_round: int | None = Field(None, ge=1)
    """Prompts of a round, in their order, and after the last the first. None: all, every round."""
    optimizer: Literal["carried", "fresh"] = "carried"
    """Whether the optimiser's moments are carried from round to round, or begin at zero in each."""
    keep_teacher: bool = False
    """Keep the teacher loaded between rounds, as rounds of one step want, at the price of its memory."""
    eval_every: int = Field(1, ge=1)
    """Rounds between evaluations on `eval_prompts`; the last round always makes one."""
