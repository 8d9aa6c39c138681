"""What every engine does: draw responses and score them, token ids in, token ids out.

B = sequences or prompts, R = response tokens of one of them, V = vocabulary; nats throughout.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.signals.channels import Channels
from lightopd.errors import InputError
from lightopd.schemas import records
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.records import Floats, Ids, RolloutSignal, Sample

if TYPE_CHECKING:
    from lightopd.models.head import Head

Tail = Literal["exact", "derived"]
"""How the mass outside the top-k is known: summed over the other tokens, or 1 minus the kept mass."""


@runtime_checkable
class SeesWholeTails(Protocol):
    """What an engine also does that has every probability of a position at hand."""

    def sum_tails(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> NDArray[np.float64]:
        """The probabilities outside what `Engine.score` keeps, added up over all response tokens, [V]."""
        ...

    def sum_negentropies(self, sequences: Sequence[records.Sequence]) -> float:
        """Sum of T log T over the vocabulary, added up over all response tokens, nats."""
        ...


@runtime_checkable
class KeepsHiddenStates(Protocol):
    """What an engine also does that has the last hidden state of a position at hand, after the final norm."""

    def own_head(self) -> "Head":
        """The output layer that reads the hidden states, in the model's own number format."""
        ...

    def sum_hidden(
        self, sequences: Sequence[records.Sequence]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Hidden states and their squares, added up over all response tokens, [D] each."""
        ...

    def score_hidden(
        self,
        sequences: Sequence[records.Sequence],
        top_k: int,
        min_probability: float,
        channels: Channels | None,
    ) -> list[RolloutSignal]:
        """As `Engine.score`, with the hidden states as int8 under such statistics, or as bfloat16."""
        ...


@runtime_checkable
class AsksServers(Protocol):
    """What an engine also does that asks servers, behind each of which there may be several replicas."""

    def score_everywhere(self, sequence: records.Sequence, times: int) -> dict[str, list[Floats]]:
        """Log-probabilities of one response, scored so many times at once by every address that replies."""
        ...


class Engine(Protocol):
    """One loaded model that generates and scores."""

    vocabulary_size: int
    """Width of the output layer, the real softmax width; every id lies below it."""
    context_length: int
    """Most tokens in prompt and response together."""

    def generate(
        self, prompts: Sequence[Ids], sampling: SamplingConfig, keys: Sequence[str], stop_ids: Sequence[int]
    ) -> list[Sample]:
        """Draw one response per entry of `prompts`, in the order given.

        Args:
            prompts: int32 ids; a prompt that is sampled n times stands there n times.
            sampling: temperature, nucleus, longest response, seed; `n` is the caller's affair.
            keys: one stable string per entry. The random numbers of a row depend on (seed, key) only, so the
                rows beside it change nothing beyond floating-point noise in the logits.
            stop_ids: ids that end a response; the one drawn is kept. `sampling.stop` has texts that end one
                too, with the token that completes it.

        Raises:
            InputError: a prompt is empty, fills the context, or has ids outside the vocabulary.
            EngineError: NaN or +inf logits, or not enough memory.
        """
        ...

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[RolloutSignal]:
        """Log-probabilities of every response token, in the order given.

        Args:
            sequences: prompt and response ids; an empty response has empty scores. Where a sequence has a
                support, its ids are kept beside the `top_k` most likely ones (engines of
                kind hf only).
            top_k: most entries kept at a position, 0 to V.
            min_probability: entries less likely than this are left to the tail; none may remain.

        Raises:
            InputError: a sequence is longer than the context, its prompt is empty, ids lie outside the
                vocabulary, or `top_k` is above V.
            EngineError: NaN or +inf logits, or not enough memory.
        """
        ...

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        ...


def random_stream(seed: int, key: str) -> np.random.Generator:
    """Random numbers that depend on seed and key only.

    Source: Philox-4x64, Salmon et al. (2011), with the first 128 bits of SHA-256 as its key.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def row_seed(seed: int, key: str) -> int:
    """Seed in 0 to 2^63 - 1 that depends on seed and key only, for libraries that draw by themselves."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little") >> 1


def check_prompts(
    prompts: Sequence[Ids], keys: Sequence[str], vocabulary_size: int, context_length: int
) -> None:
    """Refuse prompts that cannot be answered.

    Raises:
        InputError: names the key of the first prompt that is empty, leaves no room for a response, or has ids
            outside the vocabulary.
    """
    if len(prompts) != len(keys):
        raise InputError(f"{len(prompts)} prompts came with {len(keys)} keys; give one key per prompt")
    for prompt_ids, key in zip(prompts, keys, strict=True):
        _check_ids(f"the prompt of rollout {key}", prompt_ids, vocabulary_size)
        if len(prompt_ids) >= context_length:
            raise InputError(
                f"the prompt of rollout {key} has {len(prompt_ids)} tokens and the model's context holds "
                f"{context_length}, so no response fits; shorten or drop the prompt"
            )


def check_sequences(
    sequences: Sequence[records.Sequence], top_k: int, vocabulary_size: int, context_length: int
) -> None:
    """Refuse sequences that cannot be scored.

    Raises:
        InputError: names the index of the first sequence with an empty prompt, ids outside the vocabulary, or
            more tokens than the context; or says that `top_k` is above the vocabulary.
    """
    if not 0 <= top_k <= vocabulary_size:
        raise InputError(
            f"top_k is {top_k}, but the model has {vocabulary_size} tokens; choose 0 to {vocabulary_size}"
        )
    for index, sequence in enumerate(sequences):
        _check_ids(f"the prompt of sequence {index}", sequence.prompt_ids, vocabulary_size)
        if len(sequence.response_ids):
            _check_ids(f"the response of sequence {index}", sequence.response_ids, vocabulary_size)
        length = len(sequence.prompt_ids) + len(sequence.response_ids)
        if length > context_length:
            raise InputError(
                f"sequence {index} has {length} tokens and the model's context holds {context_length}; "
                f"sample shorter responses or drop the row"
            )


def keep_ids_below(scores: RolloutSignal, limit: int) -> RolloutSignal:
    """Scores without the top-k entries of ids from `limit` on; their mass goes to the tail.

    A student with fewer outputs than the model has no probability for such ids.
    """
    is_kept = scores.topk_ids < limit
    if is_kept.all():
        return scores
    num_positions = len(scores.topk_counts)
    position = np.repeat(np.arange(num_positions), scores.topk_counts)
    dropped = np.exp(scores.topk_logprobs[~is_kept].astype(np.float64))
    mass = np.bincount(position[~is_kept], weights=dropped, minlength=num_positions)
    with np.errstate(divide="ignore"):
        tails = np.log(np.minimum(np.exp(scores.tail_logprobs.astype(np.float64)) + mass, 1.0))
    return replace(
        scores,
        topk_counts=np.bincount(position[is_kept], minlength=num_positions).astype(np.int32),
        topk_ids=scores.topk_ids[is_kept],
        topk_logprobs=scores.topk_logprobs[is_kept],
        tail_logprobs=tails.astype(np.float32),
    )


def _check_ids(name: str, ids: Ids, vocabulary_size: int) -> None:
    if len(ids) == 0:
        raise InputError(
            f"{name} is empty and the first token would follow nothing; give it one token or more"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary_size:
        raise InputError(
            f"{name} has id {low if low < 0 else high}, outside the model's vocabulary of {vocabulary_size}; "
            f"the ids come from another tokenizer"
        )
