"""Configs of the parts that change an advantage: baseline, shifts and scales."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lightopd.schemas.base import StrictModel


class ExpectedBaseline(StrictModel):
    """The student's expected advantage on the teacher's support (after arXiv 2605.07865)."""

    kind: Literal["expected"] = "expected"
    """sum over the support of s (renormalised there) times A (from full-vocabulary log-probabilities)."""
    support: Literal["topk", "topk_and_sampled"] = "topk"
    """`topk_and_sampled` is refused: such a baseline depends on the sampled token and biases the gradient."""
    ratio_cap: float | None = Field(None, gt=0)
    """Multiply the baseline term alone by min(s / who sampled, cap); none leaves it as it is."""

    @model_validator(mode="after")
    def _independent_of_the_action(self) -> "ExpectedBaseline":
        if self.support == "topk_and_sampled":
            raise ValueError(
                "a baseline's support may not contain the sampled token by construction: it would depend on "
                "the action and bias the gradient; use support: topk"
            )
        return self


class MarginShift(StrictModel):
    """Moves correct rollouts above incorrect ones of the same prompt by a margin (arXiv 2605.03677)."""

    kind: Literal["margin"]
    """Added to every token's advantage; from teacher and student at rollout, so it does not change later."""
    delta: float = 0.4
    """Wanted gap, in nats per token, between correct and incorrect rollouts."""
    direction: Literal["both", "correct_up", "incorrect_down"] = "both"
    """Who is moved: both by half, or one side by all of it."""
    scope: Literal["group", "global"] = "group"
    """The gap of each prompt, or one gap of the whole cache."""
    gap: Literal["mean", "min_max"] = "mean"
    """Distance of the means, or from the lowest correct to the highest incorrect rollout."""


class GroupRewardShift(StrictModel):
    """Adds the group-normalised reward to the advantage (GRPO + OPD)."""

    kind: Literal["group_reward"]
    """(reward - mean of the group) / (standard deviation + epsilon), the same at every token; 0 for a prompt
    with a single rollout, where verl has the plain reward."""
    coefficient: float = 1.0
    """Its share in the sum."""
    epsilon: float = Field(1e-6, gt=0)
    """Added to the standard deviation."""


class ShuffleAdvantage(StrictModel):
    """Deals a rollout's advantages out to its tokens anew: a control without token credit (2608.31046)."""

    kind: Literal["shuffle"]
    """A permutation of the trained tokens of each rollout, the same at every step; sums stay as they are."""
    seed: int = 0
    """With the rollout's id it decides the permutation."""


class StepDriftScale(StrictModel):
    """Scales the advantage of a turn by how far student and teacher have drifted (arXiv 2605.07725)."""

    kind: Literal["step_drift"]
    """min((d_1 + eps) / (d_k + eps), 1 + delta), d_k = mean |log s at rollout - log T| of turn k."""
    delta: float = Field(0.2, ge=0)
    """How far above one the scale may go; 0.2 in the launch script, 0.5 in the config class."""
    epsilon: float = Field(1e-6, gt=0)
    """Keeps a turn without any gap finite."""


class CoefficientScale(StrictModel):
    """Multiplies the advantage by a number."""

    kind: Literal["coefficient"]
    """A := value * A."""
    value: float = Field(gt=0)
    """The factor."""


AdvantagePart = Annotated[
    MarginShift | GroupRewardShift | ShuffleAdvantage | StepDriftScale | CoefficientScale,
    Field(discriminator="kind"),
]
