"""A toy language model with exactly known logits, in numpy: the engine of tests and development.

The logits after a context are the sum of three seeded random rows: one for the last token, one for the token
before it, one for the position. So a shift by one, a lost prompt token or a wrong position all change them.

T = tokens of a context, R = response tokens, K = top-k, V = vocabulary; nats throughout.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightopd.engines.base import check_prompts, check_sequences, random_stream
from lightopd.errors import EngineError
from lightopd.schemas import records
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.records import Ids, RolloutSignal, Sample, Support

Doubles = NDArray[np.float64]


class FakeEngine:
    """Implements `Engine` in float64, and fails or misbehaves on request.

    Args:
        seed: of the model; equal seeds are equal models.
        vocabulary_size: V.
        context_length: most tokens in prompt and response together.
        scale: standard deviation of the logits; larger is a surer model.
        noise_nats: standard deviation of random noise on every logit, other at every call.
        fail_at_call: the how-manieth call of `generate` or `score`, from 1, raises `failure`; 0 is never.
        failure: what is raised.
        nan_at_call: the how-manieth call, from 1, meets NaN logits; 0 is never.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        vocabulary_size: int = 32,
        context_length: int = 64,
        scale: float = 2.0,
        noise_nats: float = 0.0,
        fail_at_call: int = 0,
        failure: BaseException | None = None,
        nan_at_call: int = 0,
    ) -> None:
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self.num_calls = 0
        random = np.random.default_rng(seed)
        self._last_VV = random.normal(size=(vocabulary_size, vocabulary_size)) * scale * 0.8
        self._before_VV = random.normal(size=(vocabulary_size, vocabulary_size)) * scale * 0.5
        self._position_TV = random.normal(size=(context_length + 1, vocabulary_size)) * scale * 0.33
        self._noise_nats = noise_nats
        self._noise = np.random.default_rng(seed + 1)
        self._fail_at_call = fail_at_call
        self._failure = failure or EngineError(f"the fake engine was told to fail at call {fail_at_call}")
        self._nan_at_call = nan_at_call

    def logits(self, context_ids: Ids) -> Doubles:
        """Exact logits float64 [V] of the token after a context of at least one token, without noise."""
        logits_V = self._last_VV[context_ids[-1]] + self._position_TV[len(context_ids)]
        if len(context_ids) > 1:
            logits_V = logits_V + self._before_VV[context_ids[-2]]
        return np.asarray(logits_V)

    def generate(
        self, prompts: Sequence[Ids], sampling: SamplingConfig, keys: Sequence[str], stop_ids: Sequence[int]
    ) -> list[Sample]:
        """Draw responses; see `Engine.generate`."""
        self._count_call()
        check_prompts(prompts, keys, self.vocabulary_size, self.context_length)
        return [
            self._draw(prompt_ids, sampling, key, frozenset(stop_ids))
            for prompt_ids, key in zip(prompts, keys, strict=True)
        ]

    def score(
        self, sequences: Sequence[records.Sequence], top_k: int, min_probability: float = 0.0
    ) -> list[RolloutSignal]:
        """Score responses; see `Engine.score`."""
        self._count_call()
        check_sequences(sequences, top_k, self.vocabulary_size, self.context_length)
        return [
            exact_scores(
                self._response_logits(sequence, f"sequence {index}"),
                sequence.response_ids,
                top_k,
                min_probability,
                sequence.support,
            )
            for index, sequence in enumerate(sequences)
        ]

    def close(self) -> None:
        """Nothing to free."""

    def _count_call(self) -> None:
        self.num_calls += 1
        if self.num_calls == self._fail_at_call:
            raise self._failure

    def _observed_logits(self, context_ids: Ids, name: str) -> Doubles:
        logits_V = self.logits(context_ids)
        if self._noise_nats:
            logits_V = logits_V + self._noise.normal(size=self.vocabulary_size) * self._noise_nats
        if self.num_calls == self._nan_at_call:
            raise EngineError(
                f"the logits of {name} after {len(context_ids)} tokens are not finite: the weights or "
                f"their number format are broken"
            )
        return logits_V

    def _response_logits(self, sequence: records.Sequence, name: str) -> Doubles:
        ids = np.concatenate([sequence.prompt_ids, sequence.response_ids])
        start = len(sequence.prompt_ids)
        rows = [self._observed_logits(ids[:end], name) for end in range(start, len(ids))]
        return np.array(rows).reshape(-1, self.vocabulary_size)

    def _draw(self, prompt_ids: Ids, sampling: SamplingConfig, key: str, stop_ids: frozenset[int]) -> Sample:
        stream = random_stream(sampling.seed, key)
        ids = list(prompt_ids)
        limit = min(sampling.max_tokens, self.context_length - len(prompt_ids))
        logprobs: list[float] = []
        entropies: list[float] = []
        behavior_logprobs: list[float] = []
        drawn = -1
        while len(logprobs) < limit and drawn not in stop_ids:
            logits_V = self._observed_logits(np.array(ids), f"rollout {key}")
            logprobs_V = _log_softmax(logits_V)
            drawn, behavior_logprob = _pick(logits_V, sampling, stream)
            ids.append(np.int32(drawn))
            logprobs.append(logprobs_V[drawn])
            behavior_logprobs.append(logprobs_V[drawn] if sampling.is_raw else behavior_logprob)
            entropies.append(-(np.exp(logprobs_V) * logprobs_V).sum())
        return Sample(
            response_ids=np.array(ids[len(prompt_ids) :], dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            entropies=np.array(entropies, dtype=np.float32),
            finish_reason="stop" if drawn in stop_ids else "length",
            behavior_logprobs=np.array(behavior_logprobs, dtype=np.float32),
        )


def exact_scores(
    logits_RV: Doubles, response_ids: Ids, top_k: int, min_probability: float, support: Support | None = None
) -> RolloutSignal:
    """Scores from all logits at once, in float64, the plain definition of what an engine returns.

    Args:
        logits_RV: float64, of each response token.
        response_ids: int32 [R].
        top_k: entries kept at each position, 0 to V; equally likely tokens come lowest id first.
        min_probability: less likely entries are left to the tail.
        support: ids that are kept at each position whatever their probability.
    """
    logprobs_RV = _log_softmax(logits_RV)
    order_RV = np.argsort(-logprobs_RV, axis=-1, kind="stable")
    sorted_RV = np.take_along_axis(logprobs_RV, order_RV, axis=-1)
    counts_R = np.minimum((np.exp(sorted_RV) >= min_probability).sum(-1), top_k)
    is_kept_RV = np.arange(logprobs_RV.shape[-1]) < counts_R[:, None]
    if support is not None:
        is_asked_RV = np.zeros_like(is_kept_RV)
        is_asked_RV[np.repeat(np.arange(len(support.counts)), support.counts), support.ids] = True
        is_kept_RV = is_kept_RV | np.take_along_axis(is_asked_RV, order_RV, axis=-1)
        counts_R = is_kept_RV.sum(-1)
    with np.errstate(divide="ignore"):
        tail_R = np.minimum(np.log(np.where(is_kept_RV, 0.0, np.exp(sorted_RV)).sum(-1)), 0.0)
    return RolloutSignal(
        logprobs=logprobs_RV[np.arange(len(response_ids)), response_ids].astype(np.float32),
        topk_counts=counts_R.astype(np.int32),
        topk_ids=order_RV[is_kept_RV].astype(np.int32),
        topk_logprobs=sorted_RV[is_kept_RV].astype(np.float32),
        tail_logprobs=tail_R.astype(np.float32),
    )


def _log_softmax(logits_V: Doubles) -> Doubles:
    shifted_V = logits_V - logits_V.max(axis=-1, keepdims=True)
    return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum(axis=-1, keepdims=True)))


def _pick(logits_V: Doubles, sampling: SamplingConfig, stream: np.random.Generator) -> tuple[int, float]:
    """Inverse of the cumulative distribution at one uniform number, over the ids in their order.

    With the id comes its log-probability under that distribution.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax()), 0.0
    probabilities_V = np.exp(_log_softmax(logits_V / sampling.temperature))
    order_V = np.argsort(-probabilities_V, kind="stable")
    mass_before_V = np.cumsum(probabilities_V[order_V]) - probabilities_V[order_V]
    probabilities_V[order_V[mass_before_V >= sampling.top_p]] = 0.0
    cumulative_V = np.cumsum(probabilities_V)
    target = min(stream.random() * cumulative_V[-1], np.nextafter(cumulative_V[-1], 0))
    drawn = int(np.searchsorted(cumulative_V, target, side="right"))
    return drawn, float(np.log(probabilities_V[drawn] / cumulative_V[-1]))
