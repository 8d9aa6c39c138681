"""What the two vLLM engines share: many requests at once, and answers made into samples and scores.

R = response tokens, M = top-k + 1 entries of a position (its own token, then the k most likely).
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from lightopd.engines.base import check_prompts, check_sequences, row_seed
from lightopd.engines.hf.score import empty_scores
from lightopd.engines.stop_strings import StopReader, StopStrings
from lightopd.engines.vllm.concurrency import LoopThread, run_all
from lightopd.engines.vllm.from_logprobs import sample_of, scores_of
from lightopd.engines.vllm.settings import check_sampling
from lightopd.models.limits import ModelLimits
from lightopd.schemas import records
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.records import Floats, Ids, RolloutSignal, Sample

IN_FLIGHT_BYTES = 1 << 30
"""Memory for log-probabilities that were requested and are not yet packed."""

Result = TypeVar("Result")


class Drawn(NamedTuple):
    """One response as vLLM gives it."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str | None
    is_at_string: bool = False
    """Whether it ends with the token that completes one of `sampling.stop`."""

    def cut(self, reader: StopReader | None) -> "Drawn":
        """The response up to the first token that completes a string; itself where none does."""
        for place, token in enumerate(self.ids if reader else ()):
            if reader and reader.is_end(token):
                return Drawn(self.ids[: place + 1], self.logprobs[: place + 1], "stop", True)
        return self


class RequestEngine(ABC):
    """Draws and scores one sequence a request; an engine says how a request is made.

    Args:
        loop: where requests run; it is closed with the engine.
        limits: of the model, or shorter.
        entry_bytes: memory of one log-probability in a reply.
        is_processed: log-probabilities of drawn tokens are those after temperature and truncation.
        most: requests at once; None for no limit but that of memory.
        stops: finds `sampling.stop` in responses.
    """

    def __init__(
        self,
        loop: LoopThread,
        limits: ModelLimits,
        entry_bytes: int,
        *,
        is_processed: bool,
        stops: StopStrings,
        most: int | None = None,
    ) -> None:
        self._is_processed, self._stops = is_processed, stops
        self.vocabulary_size, self.context_length = limits.vocabulary_size, limits.context_length
        self._loop, self._entry_bytes, self._most = loop, entry_bytes, most

    @abstractmethod
    async def _draw(
        self, name: str, prompt_ids: Ids, sampling: SamplingConfig, limit: int, seed: int, stop_ids: list[int]
    ) -> Drawn:
        """Draw one response of at most `limit` tokens."""

    @abstractmethod
    async def _score(self, name: str, sequence: records.Sequence, top_k: int) -> tuple[Ids, Floats]:
        """Ids and log-probabilities [R, M] of one response."""

    def generate(
        self, prompts: Sequence[Ids], sampling: SamplingConfig, keys: Sequence[str], stop_ids: Sequence[int]
    ) -> list[Sample]:
        """Draw responses; see `Engine.generate`."""
        check_prompts(prompts, keys, self.vocabulary_size, self.context_length)
        check_sampling(sampling)
        limits = [min(sampling.max_tokens, self.context_length - len(prompt)) for prompt in prompts]
        stops = sorted(set(map(int, stop_ids)))
        new_reader = self._stops.readers(sampling)

        async def draw(index: int) -> Sample:
            name, limit, seed = f"rollout {keys[index]}", limits[index], row_seed(sampling.seed, keys[index])
            drawn = await self._draw(name, prompts[index], sampling, limit, seed, stops)
            drawn = drawn.cut(new_reader(prompts[index]) if new_reader else None)
            sample = sample_of(
                name, *drawn[:3], limit, stops, self.vocabulary_size, is_at_string=drawn.is_at_string
            )
            return await self._told_both(name, prompts[index], sample, sampling)

        lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        return self._run("sampling", draw, lengths)

    async def _told_both(
        self, name: str, prompt_ids: Ids, sample: Sample, sampling: SamplingConfig
    ) -> Sample:
        """A drawn response with the raw log-probabilities and with those that it was drawn by.

        vLLM tells one of them with a drawn token. Where that is the other, the raw ones come from scoring the
        response, a small part of what drawing it took.
        """
        told, is_greedy = sample.logprobs, sampling.temperature == 0
        is_told_raw = sampling.is_raw or (is_greedy and sampling.repetition_penalty == 1)
        if self._is_processed and not is_told_raw:
            sequence = records.Sequence(prompt_ids, sample.response_ids)
            rows = await self._score(name, sequence, 0)
            scores = scores_of(name, sample.response_ids, *rows, 0.0, self.vocabulary_size)
            sample = replace(sample, logprobs=scores.logprobs)
        if is_greedy:
            return replace(sample, behavior_logprobs=np.zeros_like(told))
        is_known = self._is_processed or sampling.is_raw
        return replace(sample, behavior_logprobs=told if is_known else None)

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[RolloutSignal]:
        """Score responses; see `Engine.score`. What is requested at once is bounded by `IN_FLIGHT_BYTES`."""
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]

        async def score_one(place: int) -> RolloutSignal:
            sequence, name = sequences[filled[place]], f"sequence {filled[place]}"
            rows = await self._score(name, sequence, top_k)
            return scores_of(name, sequence.response_ids, *rows, min_probability, self.vocabulary_size)

        lengths = [len(sequences[i].prompt_ids) + len(sequences[i].response_ids) for i in filled]
        scored = self._run("scoring", score_one, [(top_k + 1) * length for length in lengths])
        results = [empty_scores()] * len(sequences)
        for index, scores in zip(filled, scored, strict=True):
            results[index] = scores
        return results

    def _run(
        self, doing: str, ask: Callable[[int], Awaitable[Result]], num_entries: Sequence[int]
    ) -> list[Result]:
        """Results of every request, in order, given how many log-probabilities each reply holds."""
        sizes = [self._entry_bytes * entries for entries in num_entries]
        return self._loop.run(run_all(ask, sizes, IN_FLIGHT_BYTES, self._most))


def ids_of(sequence: records.Sequence) -> Ids:
    """Prompt and response as one int32 array."""
    return np.concatenate([sequence.prompt_ids, sequence.response_ids])
