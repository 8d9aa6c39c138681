"""The engine that runs a model with vLLM in this process: token ids in, token ids out, no tokenizer loaded.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely).
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lightopd.engines.stop_strings import StopReader, StopStrings
from lightopd.engines.vllm import settings as vllm_settings
from lightopd.engines.vllm.concurrency import LoopThread
from lightopd.engines.vllm.requests import Drawn, RequestEngine, Result, ids_of
from lightopd.errors import EngineError
from lightopd.models.limits import ModelLimits, model_limits
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig, SamplingConfig, VllmEngine
from lightopd.schemas.records import Floats, Ids

ENTRY_BYTES = 96
"""Memory of one log-probability in vLLM's lists: number, id and rank as Python objects, and their places."""


class VllmInProcess(RequestEngine):
    """Implements `Engine` with vLLM; built by `load_vllm_engine`."""

    def __init__(
        self, loop: LoopThread, client: Any, adapter: Any, limits: ModelLimits, stops: StopStrings
    ) -> None:
        super().__init__(loop, limits, ENTRY_BYTES, is_processed=True, stops=stops)
        self._client: Any = client
        self._adapter = adapter
        self._num_requests = 0

    async def _draw(
        self, name: str, prompt_ids: Ids, sampling: SamplingConfig, limit: int, seed: int, stop_ids: list[int]
    ) -> Drawn:
        params = vllm_settings.sampling_params(sampling, limit, seed, stop_ids)
        if (new_reader := self._stops.readers(sampling)) is not None:
            return await self._drawn_until(name, prompt_ids, params, new_reader(prompt_ids))
        output = (await self._reply(prompt_ids, params)).outputs[0]
        flat = output.logprobs
        if flat is None or list(flat.token_ids) != list(output.token_ids):
            raise EngineError(f"{name} came back without the log-probabilities of its tokens")
        return Drawn(output.token_ids, flat.logprobs, output.finish_reason)

    async def _drawn_until(self, name: str, prompt_ids: Ids, params: Any, reader: StopReader) -> Drawn:
        """A response that is read while it is drawn; its request ends where a string is complete."""
        ids: list[int] = []
        logprobs: list[float] = []
        async with contextlib.aclosing(self._replies(prompt_ids, params)) as replies:
            async for reply in replies:
                output = reply.outputs[0]
                new = list(output.token_ids)
                if new and (output.logprobs is None or list(output.logprobs.token_ids) != new):
                    raise EngineError(f"{name} came back without the log-probabilities of its tokens")
                ids += new
                logprobs += output.logprobs.logprobs if new else []
                if any(reader.is_end(token) for token in new) or output.finish_reason:
                    return Drawn(ids, logprobs, output.finish_reason)
        raise EngineError("vLLM ended a request without a reply; run the command again")

    async def _score(self, name: str, sequence: records.Sequence, top_k: int) -> tuple[Ids, Floats]:
        reply = await self._reply(ids_of(sequence), vllm_settings.scoring_params(top_k))
        return _response_rows(name, reply.prompt_logprobs, sequence, top_k)

    def _run(
        self, doing: str, ask: Callable[[int], Awaitable[Result]], num_entries: Sequence[int]
    ) -> list[Result]:
        with _told_as_engine_errors(doing):
            return super()._run(doing, ask, num_entries)

    def close(self) -> None:
        """End vLLM's processes and free their memory; closing twice is allowed."""
        client, self._client = self._client, None
        if client is not None:
            # vLLM's own task would tell of the end of its processes as of a crash.
            self._loop.cancel()
            client.shutdown()
        self._loop.close()

    async def _reply(self, ids: Ids, params: Any) -> Any:
        """vLLM's finished reply to one request."""
        replies = [reply async for reply in self._replies(ids, params) if reply.finished]
        if not replies:
            raise EngineError("vLLM ended a request without a reply; run the command again")
        return replies[-1]

    def _replies(self, ids: Ids, params: Any) -> Any:
        """vLLM's replies to one request, as they come."""
        assert self._client is not None, "the engine is closed"
        self._num_requests += 1
        asked = {"type": "token", "prompt_token_ids": ids.tolist()}
        return self._client.generate(asked, params, str(self._num_requests), lora_request=self._adapter)


def load_vllm_engine(engine: VllmEngine, model: ModelConfig) -> VllmInProcess:
    """Start vLLM with a model.

    Raises:
        InputError: the model cannot be read.
        ConfigError: vLLM is not installed, or a setting does not fit the model.
        EngineError: vLLM cannot load the model.
    """
    limits = vllm_settings.limits_of(engine, model_limits(model))
    vllm_settings.check_head_size(model)
    arguments = vllm_settings.engine_arguments(engine, model, limits)
    vllm_settings.prepare_environment()
    loop = LoopThread()
    try:
        with _told_as_engine_errors(f"loading {model.path}"):
            client = loop.run(vllm_settings.start(arguments))
            adapter = vllm_settings.adapter_request(model)
            return VllmInProcess(loop, client, adapter, limits, StopStrings(model))
    except BaseException:  # Ctrl-C too: the thread would keep the process alive
        loop.close()
        raise


def _response_rows(name: str, flat: Any, sequence: records.Sequence, top_k: int) -> tuple[Ids, Floats]:
    """Ids and log-probabilities [R, M] of the response out of vLLM's flat lists over all positions."""
    first, length = len(sequence.prompt_ids), len(sequence.prompt_ids) + len(sequence.response_ids)
    width = top_k + 1
    found = 0 if flat is None else len(flat)
    if found != length or flat.end_indices[-1] - flat.start_indices[first] != (length - first) * width:
        raise EngineError(
            f"{name} has {length} tokens and came back with log-probabilities at {found} positions, or with "
            f"fewer than {width} at one of them; vLLM dropped some: report its version"
        )
    part = slice(flat.start_indices[first], flat.end_indices[-1])
    ids_RM = np.array(flat.token_ids[part], dtype=np.int32).reshape(-1, width)
    logprobs_RM = np.array(flat.logprobs[part], dtype=np.float32).reshape(-1, width)
    return ids_RM, logprobs_RM


@contextlib.contextmanager
def _told_as_engine_errors(doing: str) -> Iterator[None]:
    """What vLLM raises, in one line that says what to look at."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError, RuntimeError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EngineError(
            f"vLLM stopped while {doing} ({reason}); its own log is above this line. When it lacks memory, "
            f"lower engine.batch_tokens, engine.max_model_len or engine.gpu_memory_utilization"
        ) from error
