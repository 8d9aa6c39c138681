"""The engine that asks a vLLM server someone already runs: token ids in, token ids out.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely).
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightopd.engines.stop_strings import StopStrings
from lightopd.engines.vllm.concurrency import LoopThread
from lightopd.engines.vllm.requests import Drawn, RequestEngine, ids_of
from lightopd.engines.vllm.server_http import NoAnswerError, ServerPool
from lightopd.engines.vllm.server_probe import Served, check_top_k, probe, served_model
from lightopd.engines.vllm.server_replies import Choice, Completion, parse, response_rows
from lightopd.errors import EngineError
from lightopd.models.limits import precision_of
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig, SamplingConfig, ServerEngine
from lightopd.schemas.manifest import EngineRecord, Precision
from lightopd.schemas.records import Floats, Ids, RolloutSignal

log = logging.getLogger(__name__)

ENTRY_BYTES = 512
"""Memory of one log-probability while a reply is read: its JSON text and the Python objects of it."""


class ServerClient(RequestEngine):
    """Implements `Engine` with vLLM servers; built by `load_server_engine`."""

    def __init__(
        self, loop: LoopThread, pool: ServerPool, engine: ServerEngine, served: Served, stops: StopStrings
    ) -> None:
        most = engine.concurrency * len(engine.urls)
        super().__init__(
            loop, served.limits, ENTRY_BYTES, is_processed=served.is_processed, stops=stops, most=most
        )
        self._pool = pool
        self._name = served.name
        self._checked_top_k = 0

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[RolloutSignal]:
        """Score responses; see `Engine.score`.

        Raises:
            EngineError: also when a server caps log-probabilities below `top_k`, or does not reply.
        """
        if self._checked_top_k < top_k <= self.vocabulary_size:
            self._loop.run(check_top_k(self._pool, self._name, top_k))
            self._checked_top_k = top_k
        return super().score(sequences, top_k, min_probability)

    def score_everywhere(self, sequence: records.Sequence, times: int) -> dict[str, list[Floats]]:
        """Log-probabilities of one response from every server, `times` at once; silent ones are left out.

        Raises:
            EngineError: an answer is not what it must be.
        """
        return self._loop.run(self._everywhere(sequence, times))

    async def _everywhere(self, sequence: records.Sequence, times: int) -> dict[str, list[Floats]]:
        found = {}
        for url in self._pool.urls:
            asked = [self._score_at(url, sequence) for _ in range(times)]
            try:
                found[url] = list(await asyncio.gather(*asked))
            except NoAnswerError:
                log.warning("%s does not reply; the other servers take its work", url)
        return found

    async def _score_at(self, url: str, sequence: records.Sequence) -> Floats:
        choice = await self._complete(url, ids_of(sequence), _scoring(0), url)
        return response_rows(url, choice, sequence, 0)[1][:, 0]

    def close(self) -> None:
        """Close the connections; the server runs on. Closing twice is allowed."""
        if not self._loop.is_closed:
            self._loop.run(self._pool.close())
            self._loop.close()

    async def _draw(
        self, name: str, prompt_ids: Ids, sampling: SamplingConfig, limit: int, seed: int, stop_ids: list[int]
    ) -> Drawn:
        choice = await self._complete(name, prompt_ids, _drawing(sampling, limit, seed, stop_ids))
        logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        return Drawn(choice.token_ids, logprobs, choice.finish_reason, choice.stop_reason in sampling.stop)

    async def _score(self, name: str, sequence: records.Sequence, top_k: int) -> tuple[Ids, Floats]:
        choice = await self._complete(name, ids_of(sequence), _scoring(top_k))
        return response_rows(name, choice, sequence, top_k)

    async def _complete(
        self, name: str, ids: Ids, settings: Mapping[str, Any], url: str | None = None
    ) -> Choice:
        """The one choice of a completion whose prompt came back as it was sent."""
        sent = ids.tolist()
        body = {"model": self._name, "prompt": sent, **settings}
        reply = await self._pool.post("/v1/completions", body, url)
        choice = parse(Completion, reply, name).choices[0]
        if choice.prompt_token_ids != sent:
            raise EngineError(
                f"{name}: the server read other tokens than the {len(sent)} that were sent, or does not say "
                f"which; it tokenises anew, or is no vLLM of this year"
            )
        return choice


def load_server_engine(engine: ServerEngine, model: ModelConfig) -> ServerClient:
    """Connect to the servers and probe each of them.

    Raises:
        ConfigError: the API key is missing.
        EngineError: a server does not reply, or fails the probe.
    """
    loop, pool = LoopThread(), ServerPool(engine)
    try:
        served = loop.run(probe(pool, engine, model))
        return ServerClient(loop, pool, engine, served, StopStrings(model))
    except BaseException:  # Ctrl-C too: the thread would keep the process alive
        loop.run(pool.close())
        loop.close()
        raise


def describe_server(engine: ServerEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of a server (vLLM's version, the model's name there), and the model's precision.

    The precision that a server runs in cannot be asked for.

    Raises:
        ConfigError: the API key is missing.
        EngineError: a server does not reply, or several differ.
    """
    pool, loop = ServerPool(engine), LoopThread()
    try:
        return loop.run(served_model(pool, engine)).record, precision_of(model)
    finally:
        loop.run(pool.close())
        loop.close()


def _drawing(sampling: SamplingConfig, limit: int, seed: int, stop_ids: list[int]) -> dict[str, Any]:
    """Settings of one rollout; each that a server may have a default of its own for is named."""
    return {
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": stop_ids,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
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
