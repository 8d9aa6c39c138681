"""What crosses a stage boundary in bulk: prompts, samples, rollouts and scores.

R = response tokens of one rollout, C = top-k entries of all its positions laid end to end.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.schemas.base import canonical_hash

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
HiddenCodes = NDArray[np.int8] | NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the user gave it, before any tokenizer."""

    prompt_id: str
    """The user's `id`, or a hash of the content."""
    messages: tuple[dict[str, Any], ...] | None
    """Chat turns, each with `role` and `content`; None where `text` is given."""
    text: str | None
    """Plain prompt; under `render: chat` it becomes one user turn."""
    answer: str | None = None
    domain: str | None = None
    verifier: str | None = None
    """Name of the reward function that judges a response."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the verifier needs beyond `answer`."""
    tools: tuple[dict[str, Any], ...] | None = None
    """Tools that the chat template shows the model."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template for this prompt alone, laid over the config's."""
    where: str = field(default="", compare=False)
    """Where it stands, for messages: file and row."""

    @property
    def place(self) -> str:
        """How a message names it."""
        return self.where or f"prompt {self.prompt_id}"


def prompt_content_id(
    text: str | None,
    messages: tuple[dict[str, Any], ...] | None,
    tools: list[dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
) -> str:
    """Prompt id of a prompt without an `id`: a hash of what the model is shown, 32 hex digits."""
    content: dict[str, Any] = {"prompt": text, "messages": messages}
    content |= {"tools": tools} if tools else {}
    content |= {"chat_template_kwargs": options} if options else {}
    # Parquet can hold dates and decimals inside messages, which JSON cannot.
    return short_hash(json.loads(json.dumps(content, default=str)))


def short_hash(content: dict[str, Any]) -> str:
    """The first 32 hex digits of the canonical hash."""
    return canonical_hash(content)[:32]


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn response."""

    response_ids: Ids
    """int32 [R], exactly the drawn ids, the end token included where it was drawn."""
    logprobs: Floats
    """float32 [R], nats, of each drawn id under the raw (temperature 1, untruncated) distribution."""
    entropies: Floats | None
    """float32 [R], nats, of the raw distribution; None where the engine cannot tell."""
    finish_reason: str
    """`stop` when an end token was drawn, `length` when the token limit came first."""
    behavior_logprobs: Floats | None = None
    """float32 [R], nats, of each drawn id under the distribution it was drawn from, after temperature, top-p
    and what else narrows it; 0 for a greedy draw. None where the engine cannot tell."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """What a scorer reads: prompt ids, then response ids."""

    prompt_ids: Ids
    response_ids: Ids
    support: "Support | None" = None
    """Ids that the scores must hold at each position, whatever the model thinks of them; None for none."""


@dataclass(frozen=True, slots=True)
class Support:
    """Ids at each position of a response, such as a student's own top-k when it was sampled."""

    counts: Ids
    """[R], ids at each position."""
    ids: Ids
    """[C], ids laid end to end, none twice at a position."""


@dataclass(frozen=True, slots=True)
class RolloutSignal:
    """A model's log-probabilities over one response, full-vocabulary softmax, float32, nats."""

    logprobs: Floats
    """[R], of each response token, the end token included."""
    topk_counts: Ids
    """[R], entries kept at each position."""
    topk_ids: Ids
    """[C], token ids, most likely first within a position."""
    topk_logprobs: Floats
    """[C], their log-probabilities."""
    tail_logprobs: Floats
    """[R], log of the probability outside the kept entries; -inf when nothing is outside."""
    hidden: HiddenCodes | None = field(default=None, metadata={"kind": "hidden"})
    """[R, D], the last hidden state after the final norm: int8 codes, or bfloat16 as its 16 bits; None where
    it is not kept."""
    hidden_scales: Floats | None = field(default=None, metadata={"kind": "hidden"})
    """[R], what one step of a token's int8 codes is worth, a float16 value; None for bfloat16."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One row of the cache's rollouts, and the declaration of its columns: name, type, and null where None.

    A column that is added stands last, as `name: Type | None = field(default=None, metadata={"since": 3})`
    with the schema version it came with: older files lack it, and are read with nulls in its place.
    """

    rollout_id: str
    """Hash of prompt ids, response ids, sampler and sample index."""
    prompt_id: str
    sample_index: int
    origin: str
    """Who wrote the response: `student`, `teacher` or `imported`."""
    domain: str | None
    prompt_ids: Ids
    response_ids: Ids
    loss_mask: Bools
    """[R], True where the token was written by the model and is trained on."""
    turns: Ids
    """[R], index of the assistant turn a token belongs to."""
    logprobs: Floats | None
    """[R], log-probability at rollout time under the raw distribution of the sampler; None when imported."""
    entropies: Floats | None
    finish_reason: str
    truncated: bool
    answer: str | None
    reward: float | None
    prompt_text: str | None
    response_text: str | None
    behavior_logprobs: Floats | None = field(default=None, metadata={"since": 3})
    """[R], log-probability under the distribution that the token was drawn from, with its temperature and
    truncation; equal to `logprobs` where that is the raw one. None where nobody can tell."""
