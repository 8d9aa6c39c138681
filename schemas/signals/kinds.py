"""What a signal keeps of its model's distributions, as one typed union; each kind says what it can serve."""

from typing import Annotated, Literal

from pydantic import Field

from lightopd.schemas.base import StrictModel
from lightopd.schemas.signals.precision import TopkDtype as TopkDtype

Serves = Literal["sampled", "support", "shaped", "whole"]
"""What an objective can read: the sampled token's log-probability; the most likely tokens of a position and
the mass outside; that mass by the shape of the tail; the whole vocabulary."""


class TailShape(StrictModel):
    """The mean of a model's probabilities outside what a signal keeps, in a file beside its shards."""

    sha256: str
    """SHA-256 of `tail_shape.safetensors`."""
    tokens: int = Field(ge=1)
    """Response tokens it was made from: the cache's first rollouts."""


class HiddenStates(StrictModel):
    """The last hidden state of the model at each token, after its final norm, and the head that reads it."""

    size: int = Field(ge=1)
    """Values in a hidden state, D."""
    format: Literal["int8", "bfloat16"]
    """`int8` is standardised per channel and has a scale for each token."""
    head: str
    """SHA-256 of the head's file, `heads/<sha256>.safetensors` in the cache."""
    channels: str | None = None
    """SHA-256 of `hidden_channels.safetensors`, mean and deviation of each channel; None for bfloat16."""
    tokens: int | None = None
    """Response tokens that those were made from: the cache's first rollouts; None for bfloat16."""


class Sampled(StrictModel):
    """The log-probability of the sampled token, and nothing else."""

    kind: Literal["sampled"] = "sampled"
    """The sampled token alone."""

    @property
    def serves(self) -> frozenset[Serves]:
        """What an objective can read of it."""
        return frozenset({"sampled"})


class TopK(StrictModel):
    """The most likely tokens of each position as well, and the mass outside."""

    kind: Literal["topk"] = "topk"
    """Entries and a tail."""
    entries: int = Field(ge=1)
    """Most entries at a position."""
    min_probability: float = Field(0.0, ge=0)
    """Entries below this were left to the tail."""
    shape: TailShape | None = None
    """How the mass outside lies, on average."""

    @property
    def serves(self) -> frozenset[Serves]:
        """What an objective can read of it."""
        plain: set[Serves] = {"sampled", "support"}
        return frozenset(plain | _shaped(self.shape))


class Hidden(StrictModel):
    """The hidden states, which give the whole vocabulary, with or without entries beside them."""

    kind: Literal["hidden"] = "hidden"
    """Hidden states and a head."""
    states: HiddenStates
    """How they are kept."""
    entries: int = Field(0, ge=0)
    """Most entries at a position; 0 leaves them to the hidden states."""
    shape: TailShape | None = None
    """How the mass outside the entries lies, on average."""

    @property
    def serves(self) -> frozenset[Serves]:
        """What an objective can read of it; a support comes out of the hidden states where it is not kept."""
        plain: set[Serves] = {"sampled", "support", "whole"}
        return frozenset(plain | _shaped(self.shape))


Kept = Annotated[Sampled | TopK | Hidden, Field(discriminator="kind")]
"""What a signal keeps."""


def _shaped(shape: TailShape | None) -> set[Serves]:
    return set() if shape is None else {"shaped"}
