"""The engine that runs a model with vLLM in this process: token ids in, token ids out, no tokenizer loaded.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lightopd.engines.base import Tail, check_prompts, check_sequences, row_seed
from lightopd.engines.hf.score import empty_scores
from lightopd.engines.vllm import settings as vllm_settings
from lightopd.engines.vllm.concurrency import LoopThread, run_all
from lightopd.engines.vllm.from_logprobs import sample_of, scores_of
from lightopd.errors import EngineError
from lightopd.models.limits import model_limits
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig, SamplingConfig, VllmEngine
from lightopd.schemas.manifest import EngineRecord, Precision
from lightopd.schemas.records import Floats, Ids, Sample, Scores

ENTRY_BYTES = 96
"""Memory of one log-probability in vLLM's lists: number, id and rank as Python objects, and their places."""
IN_FLIGHT_BYTES = 1 << 30
"""Memory for log-probabilities that were asked for and are not yet packed."""


class VllmInProcess:
    """Implements `Engine` with vLLM; built by `load_vllm_engine`."""

    def __init__(self, loop: LoopThread, client: Any, adapter: Any, limits: vllm_settings.Limits) -> None:
        self.vocabulary_size = limits.vocabulary_size
        self.context_length = limits.context_length
        self.record: EngineRecord = limits.record
        self.precision: Precision = limits.precision
        self.tail: Tail = "derived"
        self._loop = loop
        self._client: Any = client
        self._adapter = adapter
        self._num_requests = 0

    def generate(
        self, prompts: Sequence[Ids], sampling: SamplingConfig, keys: Sequence[str], stop_ids: Sequence[int]
    ) -> list[Sample]:
        """Draw responses; see `Engine.generate`."""
        check_prompts(prompts, keys, self.vocabulary_size, self.context_length)
        vllm_settings.check_sampling(sampling)
        limits = [min(sampling.max_tokens, self.context_length - len(prompt)) for prompt in prompts]
        stops = sorted(set(map(int, stop_ids)))

        async def draw(index: int) -> Sample:
            params = vllm_settings.sampling_params(
                sampling, limits[index], row_seed(sampling.seed, keys[index]), stops
            )
            output = (await self._answer(prompts[index], params)).outputs[0]
            flat = output.logprobs
            if flat is None or list(flat.token_ids) != list(output.token_ids):
                raise EngineError(
                    f"rollout {keys[index]} came back without the log-probabilities of its tokens"
                )
            return sample_of(
                f"rollout {keys[index]}",
                output.token_ids,
                flat.logprobs,
                output.finish_reason,
                limits[index],
                stops,
                self.vocabulary_size,
            )

        sizes = [ENTRY_BYTES * (len(prompt) + limit) for prompt, limit in zip(prompts, limits, strict=True)]
        with _told_as_engine_errors("sampling"):
            return self._loop.run(run_all(draw, sizes, IN_FLIGHT_BYTES))

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[Scores]:
        """Score responses; see `Engine.score`. What is asked for at once is bounded by `IN_FLIGHT_BYTES`."""
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        params = vllm_settings.scoring_params(top_k)
        filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]

        async def score_one(place: int) -> Scores:
            index = filled[place]
            sequence, name = sequences[index], f"sequence {index}"
            ids = np.concatenate([sequence.prompt_ids, sequence.response_ids])
            answer = await self._answer(ids, params)
            rows = _response_rows(name, answer.prompt_logprobs, sequence, top_k)
            return scores_of(name, sequence.response_ids, *rows, min_probability, self.vocabulary_size)

        lengths = [len(sequences[i].prompt_ids) + len(sequences[i].response_ids) for i in filled]
        sizes = [ENTRY_BYTES * (top_k + 1) * length for length in lengths]
        with _told_as_engine_errors("scoring"):
            scored = self._loop.run(run_all(score_one, sizes, IN_FLIGHT_BYTES))
        results = [empty_scores()] * len(sequences)
        for index, scores in zip(filled, scored, strict=True):
            results[index] = scores
        return results

    def close(self) -> None:
        """End vLLM's processes and free their memory; closing twice is allowed."""
        client, self._client = self._client, None
        if client is not None:
            # vLLM's own task would tell of the end of its processes as of a crash.
            self._loop.cancel()
            client.shutdown()
        self._loop.close()

    async def _answer(self, ids: Ids, params: Any) -> Any:
        """vLLM's finished answer to one request."""
        assert self._client is not None, "the engine is closed"
        self._num_requests += 1
        asked = {"type": "token", "prompt_token_ids": ids.tolist()}
        name = str(self._num_requests)
        stream = self._client.generate(asked, params, name, lora_request=self._adapter)
        answers = [answer async for answer in stream if answer.finished]
        if not answers:
            raise EngineError("vLLM ended a request without an answer; run the command again")
        return answers[-1]


def load_vllm_engine(engine: VllmEngine, model: ModelConfig) -> VllmInProcess:
    """Start vLLM with a model.

    Raises:
        InputError: the model cannot be read.
        ConfigError: vLLM is not installed, or a setting does not fit the model.
        EngineError: vLLM cannot load the model.
    """
    record, precision = vllm_settings.describe_vllm(engine, model)
    limits = vllm_settings.limits_of(engine, model_limits(model), record, precision)
    vllm_settings.check_head_size(model)
    arguments = vllm_settings.engine_arguments(engine, model, limits)
    vllm_settings.prepare_environment()
    loop = LoopThread()
    try:
        with _told_as_engine_errors(f"loading {model.path}"):
            client = loop.run(vllm_settings.start(arguments))
            return VllmInProcess(loop, client, vllm_settings.adapter_request(model), limits)
    except BaseException:
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
