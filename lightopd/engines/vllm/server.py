"""The engine that asks a vLLM server someone already runs: token ids in, token ids out.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightopd.engines.base import Tail, check_prompts, check_sequences, row_seed
from lightopd.engines.hf.score import empty_scores
from lightopd.engines.vllm.concurrency import LoopThread, run_all
from lightopd.engines.vllm.from_logprobs import sample_of, scores_of
from lightopd.engines.vllm.server_http import ServerPool
from lightopd.engines.vllm.server_probe import Served, check_top_k, probe, served_model
from lightopd.engines.vllm.server_rows import number, response_rows
from lightopd.engines.vllm.settings import check_sampling
from lightopd.errors import EngineError
from lightopd.models.limits import precision_of
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig, SamplingConfig, ServerEngine
from lightopd.schemas.manifest import EngineRecord, Precision
from lightopd.schemas.records import Ids, Sample, Scores

ENTRY_BYTES = 512
"""Memory of one log-probability while an answer is read: its JSON text and the Python objects of it."""
IN_FLIGHT_BYTES = 1 << 30
"""Memory for answers that were asked for and are not yet packed."""


class ServerClient:
    """Implements `Engine` with vLLM servers; built by `load_server_engine`."""

    def __init__(
        self, loop: LoopThread, pool: ServerPool, engine: ServerEngine, served: Served, precision: Precision
    ) -> None:
        self.vocabulary_size = served.vocabulary_size
        self.context_length = served.context_length
        self.record = served.record
        self.precision = precision
        self.tail: Tail = "derived"
        self._loop = loop
        self._pool = pool
        self._name = served.name
        self._most = engine.concurrency * len(engine.urls)
        self._checked_top_k = 0

    def generate(
        self, prompts: Sequence[Ids], sampling: SamplingConfig, keys: Sequence[str], stop_ids: Sequence[int]
    ) -> list[Sample]:
        """Draw responses; see `Engine.generate`."""
        check_prompts(prompts, keys, self.vocabulary_size, self.context_length)
        check_sampling(sampling)
        limits = [min(sampling.max_tokens, self.context_length - len(prompt)) for prompt in prompts]
        stops = sorted(set(map(int, stop_ids)))

        async def draw(index: int) -> Sample:
            name, limit = f"rollout {keys[index]}", limits[index]
            seed = row_seed(sampling.seed, keys[index])
            choice = await self._complete(name, prompts[index], _drawing(sampling, limit, seed, stops))
            logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
            ids, values = choice.get("token_ids") or [], [number(value) for value in logprobs]
            return sample_of(
                name, ids, values, choice.get("finish_reason"), limit, stops, self.vocabulary_size
            )

        sizes = [ENTRY_BYTES * (len(prompt) + limit) for prompt, limit in zip(prompts, limits, strict=True)]
        return self._loop.run(run_all(draw, sizes, IN_FLIGHT_BYTES, self._most))

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[Scores]:
        """Score responses; see `Engine.score`.

        Raises:
            EngineError: also when a server caps log-probabilities below `top_k`, or does not answer.
        """
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        if top_k > self._checked_top_k:
            self._loop.run(check_top_k(self._pool, self._name, top_k))
            self._checked_top_k = top_k
        filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]

        async def score_one(place: int) -> Scores:
            sequence, name = sequences[filled[place]], f"sequence {filled[place]}"
            ids = np.concatenate([sequence.prompt_ids, sequence.response_ids])
            choice = await self._complete(name, ids, _scoring(top_k))
            rows = response_rows(name, choice.get("prompt_logprobs"), sequence, top_k)
            return scores_of(name, sequence.response_ids, *rows, min_probability, self.vocabulary_size)

        lengths = [len(sequences[i].prompt_ids) + len(sequences[i].response_ids) for i in filled]
        sizes = [ENTRY_BYTES * (top_k + 1) * length for length in lengths]
        scored = self._loop.run(run_all(score_one, sizes, IN_FLIGHT_BYTES, self._most))
        results = [empty_scores()] * len(sequences)
        for index, scores in zip(filled, scored, strict=True):
            results[index] = scores
        return results

    def close(self) -> None:
        """Close the connections; the server runs on. Closing twice is allowed."""
        if self._pool is not None:
            self._loop.run(self._pool.close())
        self._loop.close()

    async def _complete(self, name: str, ids: Ids, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of a completion whose prompt came back as it was sent."""
        sent = ids.tolist()
        answer = await self._pool.post("/v1/completions", {"model": self._name, "prompt": sent, **settings})
        choices = answer.get("choices") or [{}]
        if choices[0].get("prompt_token_ids") != sent:
            raise EngineError(
                f"{name}: the server read other tokens than the {len(sent)} that were sent, or does not say "
                f"which; it tokenises anew, or is no vLLM of this year"
            )
        choice: dict[str, Any] = choices[0]
        return choice


def load_server_engine(engine: ServerEngine, model: ModelConfig) -> ServerClient:
    """Connect to the servers and probe each of them.

    Raises:
        ConfigError: the API key is missing.
        EngineError: a server does not answer, or fails the probe.
    """
    loop, pool = LoopThread(), ServerPool(engine)
    try:
        served = loop.run(probe(pool, engine, model))
        return ServerClient(loop, pool, engine, served, precision_of(model))
    except BaseException:
        loop.run(pool.close())
        loop.close()
        raise


def describe_server(engine: ServerEngine) -> EngineRecord:
    """The lineage record of a server: vLLM's version, and the name the model is served under.

    Raises:
        ConfigError: the API key is missing.
        EngineError: a server does not answer, or several differ.
    """
    pool, loop = ServerPool(engine), LoopThread()
    try:
        return loop.run(_describe(pool, engine))
    finally:
        loop.run(pool.close())
        loop.close()


async def _describe(pool: ServerPool, engine: ServerEngine) -> EngineRecord:
    return (await served_model(pool, engine)).record


def _drawing(sampling: SamplingConfig, limit: int, seed: int, stop_ids: list[int]) -> dict[str, Any]:
    """Settings of one rollout; each that a server may have a default of its own for is named."""
    return {
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
    }


def _scoring(top_k: int) -> dict[str, Any]:
    """Every prompt token given its predecessors, and one drawn token that is thrown away."""
    return {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": top_k,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
