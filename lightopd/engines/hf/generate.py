"""Draws responses with transformers: one forward pass per token over the rows that are not finished.

`transformers.generate` returns raw log-probabilities and entropies only by keeping [T, B, V] logits, and
draws from one random stream for the whole batch; here each row has its own.

B = rows that are still running, R = rows whose nucleus is not found yet, U = distinct prompts,
T = positions, K = most likely tokens, V = vocabulary; nats throughout.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from lightopd.engines.base import random_stream
from lightopd.engines.hf.head_scores import largest
from lightopd.engines.hf.kv_cache import new_cache
from lightopd.engines.hf.memory import memory_advice
from lightopd.engines.stop_strings import NewReader, StopReader
from lightopd.errors import ConfigError, EngineError
from lightopd.models.head import last_hidden
from lightopd.models.load import LoadedModel
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.records import Ids, Sample
from lightopd.under_way import so_far

COMPACT_SHARE = 0.25
"""Share of finished rows at which they leave the batch; that copies the cache once, as every step does."""
NUCLEUS_START = 64
"""Most likely tokens looked at first when a nucleus is formed."""


@dataclass(slots=True)
class Row:
    """One response while it is drawn."""

    index: int
    key: str
    limit: int
    """Most tokens of the response."""
    uniforms: NDArray[np.float64]
    """One number in [0, 1) for each token; empty when nothing is drawn at random."""
    reader: StopReader | None = None
    """Looks for texts that end a response; None where only ids do."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    behavior_logprobs: list[float] = field(default_factory=list)
    is_stopped: bool = False

    def append(self, token: int, logprob: float, entropy: float, behavior: float, *, is_stop: bool) -> None:
        """Note a drawn token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.entropies.append(entropy)
        self.behavior_logprobs.append(behavior)
        self.is_stopped = is_stop or (self.reader is not None and self.reader.is_end(token))

    @property
    def is_finished(self) -> bool:
        return self.is_stopped or len(self.ids) >= self.limit

    def sample(self) -> Sample:
        """The finished response."""
        return Sample(
            response_ids=np.array(self.ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            entropies=np.array(self.entropies, dtype=np.float32),
            finish_reason="stop" if self.is_stopped else "length",
            behavior_logprobs=np.array(self.behavior_logprobs, dtype=np.float32),
        )


@dataclass(slots=True)
class State:
    """The running rows: what the next forward pass needs."""

    cache: DynamicCache
    hidden_BD: Tensor
    """Hidden state that predicts the next token."""
    mask_BT: Tensor
    """1 where the cache holds a real token, 0 at the padding on the left."""


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Ids],
    sampling: SamplingConfig,
    keys: Sequence[str],
    stop_ids: Sequence[int],
    batch_rows: int,
    setting: str = "engine.generate_rollouts",
    new_reader: NewReader | None = None,
) -> list[Sample]:
    """One response per prompt, in the order given.

    Args:
        batch_rows: responses drawn together; prompts of similar length share a batch.
        setting: what a user calls `batch_rows`, for the advice when memory is not enough.
        new_reader: makes what looks for `sampling.stop` in a response.

    Raises:
        EngineError: NaN or +inf logits, or not enough memory for a batch.
    """
    check_penalty(sampling)
    assert (new_reader is None) == (not sampling.stop), "texts that end a response need a reader"
    samples: dict[int, Sample] = {}
    order = sorted(
        range(len(prompts)), key=lambda index: (-len(prompts[index]), prompts[index].tobytes(), index)
    )
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=loaded.device)
    with memory_advice("generate a batch", setting, batch_rows):
        for start in range(0, len(order), batch_rows):
            rows = [
                _new_row(index, keys[index], len(prompts[index]), sampling, loaded.context_length)
                for index in order[start : start + batch_rows]
            ]
            for row in rows:
                row.reader = new_reader(prompts[row.index]) if new_reader else None
            _draw_batch(loaded, [prompts[row.index] for row in rows], rows, sampling, stops)
            samples.update((row.index, row.sample()) for row in rows)
    return [samples[index] for index in range(len(prompts))]


def check_penalty(sampling: SamplingConfig) -> None:
    """Refuse what this engine lacks.

    Raises:
        ConfigError: a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        raise ConfigError(
            f"sampling.repetition_penalty is {sampling.repetition_penalty:g}, which engine hf does not have; "
            "leave it at 1, or take engine vllm or server"
        )


def _new_row(index: int, key: str, prompt_length: int, sampling: SamplingConfig, context_length: int) -> Row:
    limit = min(sampling.max_tokens, context_length - prompt_length)
    num_uniforms = limit if sampling.temperature > 0 else 0
    return Row(index, key, limit, random_stream(sampling.seed, key).random(num_uniforms))


def _draw_batch(
    loaded: LoadedModel, prompts: Sequence[Ids], rows: Sequence[Row], sampling: SamplingConfig, stops: Tensor
) -> None:
    """Draw until every row is finished; results are left in the rows."""
    state = _prefill(loaded, prompts)
    running = list(rows)
    for length in itertools.count(1):
        so_far(f"token {length:,} of {len(running)} responses")
        drawn_B = _draw_tokens(loaded, state.hidden_BD, running, sampling, stops)
        finished = [row.is_finished for row in running]
        if all(finished):
            return
        if sum(finished) >= COMPACT_SHARE * len(running):
            kept_B = torch.tensor([not done for done in finished], device=loaded.device).nonzero()[:, 0]
            running = [row for row, done in zip(running, finished, strict=True) if not done]
            drawn_B, state.mask_BT = drawn_B[kept_B], state.mask_BT[kept_B]
            state.cache.reorder_cache(kept_B)
        _step(loaded, state, drawn_B)


def _prefill(loaded: LoadedModel, prompts: Sequence[Ids]) -> State:
    """Run each distinct prompt once, padded on the left, and give every row its copy."""
    distinct = {prompt.tobytes(): prompt for prompt in prompts}
    places = {key: place for place, key in enumerate(distinct)}
    width = max(map(len, prompts))
    ids_UT = np.zeros((len(distinct), width), dtype=np.int64)
    mask_UT = np.zeros((len(distinct), width), dtype=np.int64)
    for place, prompt in enumerate(distinct.values()):
        ids_UT[place, width - len(prompt) :] = prompt
        mask_UT[place, width - len(prompt) :] = 1
    state = State(
        cache=new_cache(loaded.model),
        hidden_BD=torch.empty(0),
        mask_BT=torch.from_numpy(mask_UT).to(loaded.device),
    )
    _forward(loaded, state, torch.from_numpy(ids_UT).to(loaded.device))
    if len(distinct) < len(prompts):
        rows_B = torch.tensor([places[prompt.tobytes()] for prompt in prompts], device=loaded.device)
        state.cache.reorder_cache(rows_B)
        state.hidden_BD, state.mask_BT = state.hidden_BD[rows_B], state.mask_BT[rows_B]
    return state


def forced_hidden(loaded: LoadedModel, rows: Sequence[Ids], num_forced: int) -> Tensor:
    """Hidden states [rows, num_forced + 1, D] of the last tokens of rows, as generation runs them.

    Args:
        rows: int32, all longer than `num_forced`; their last `num_forced` tokens are run one at a time, what
            comes before them is a prompt.
    """
    state = _prefill(loaded, [row[:-num_forced] for row in rows])
    found = [state.hidden_BD]
    for place in range(-num_forced, 0):
        ids_B = torch.tensor([int(row[place]) for row in rows], device=loaded.device)
        _step(loaded, state, ids_B)
        found.append(state.hidden_BD)
    return torch.stack(found, 1)


def _step(loaded: LoadedModel, state: State, drawn_B: Tensor) -> None:
    state.mask_BT = torch.cat([state.mask_BT, state.mask_BT.new_ones((len(drawn_B), 1))], 1)
    _forward(loaded, state, drawn_B[:, None])


def _forward(loaded: LoadedModel, state: State, ids_BT: Tensor) -> None:
    """Run new tokens, whose mask is in the state already; hidden states are replaced, the cache grows."""
    # A finished row runs on until it leaves the batch, past the end of its context where that was its limit.
    positions_BT = (state.mask_BT.cumsum(1) - 1).clamp(0, loaded.context_length - 1)[:, -ids_BT.shape[1] :]
    hidden_BTD = last_hidden(
        loaded.model,
        input_ids=ids_BT,
        attention_mask=state.mask_BT,
        position_ids=positions_BT,
        past_key_values=state.cache,
        use_cache=True,
    )
    state.hidden_BD = hidden_BTD[:, -1]


def _draw_tokens(
    loaded: LoadedModel, hidden_BD: Tensor, running: Sequence[Row], sampling: SamplingConfig, stops: Tensor
) -> Tensor:
    """Draw one id int64 [B] for every running row, and note it where the row is not finished."""
    logits_BV = loaded.head.logits(hidden_BD)
    logprobs_BV = logits_BV.log_softmax(1)
    entropies_B = torch.special.entr(logprobs_BV.exp()).sum(1)
    _check_finite(entropies_B, running)
    if sampling.temperature == 0:
        drawn_B, behavior_B = _lowest_argmax(logits_BV), torch.zeros_like(entropies_B)
    else:
        uniforms = [0.0 if row.is_finished else row.uniforms[len(row.ids)] for row in running]
        uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=loaded.device)
        drawn_B, behavior_B = draw(logits_BV, uniforms_B, sampling)
    logprobs_B = logprobs_BV.gather(1, drawn_B[:, None])[:, 0]
    if sampling.is_raw:
        behavior_B = logprobs_B
    columns = (drawn_B, logprobs_B, entropies_B, behavior_B, torch.isin(drawn_B, stops))
    for row, token, logprob, entropy, behavior, is_stop in zip(
        running, *(column.tolist() for column in columns), strict=True
    ):
        if not row.is_finished:
            row.append(token, logprob, entropy, behavior, is_stop=is_stop)
    return drawn_B


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Ids int64 [B] at which the cumulative distribution over the ids, in their order, passes the uniforms.

    Sums run in float64 and in the order of the ids, so rounding in the logits moves no boundary by more than
    itself. A token of probability zero is never drawn. With the ids come their log-probabilities under that
    distribution, float64 [B].

    Args:
        logits_BV: float32, raw.
        uniforms_B: float64 in [0, 1).
        sampling: temperature, above 0; then `min_p`, `top_k` and `top_p`, as vLLM orders them. The nucleus is
            the smallest set of the most likely tokens left that reaches `top_p` of their mass.
    """
    scaled_BV = logits_BV / sampling.temperature
    weights_BV = (scaled_BV - scaled_BV.amax(1, keepdim=True)).exp()
    if sampling.min_p:
        weights_BV = weights_BV.masked_fill(weights_BV < sampling.min_p, 0.0)
    if 0 < sampling.top_k < weights_BV.shape[1]:
        weights_BV = weights_BV.masked_fill(~_most_likely(weights_BV, sampling.top_k), 0.0)
    if sampling.top_p < 1:
        weights_BV = weights_BV.masked_fill(~_nucleus(weights_BV, sampling.top_p), 0.0)
    cumulative_BV = weights_BV.cumsum(1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniforms_B[:, None] * total_B1, below_total_B1)
    drawn_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    # From the scaled logits, not from the weight: that of a rare token underflows to zero.
    shifted_B1 = scaled_BV.gather(1, drawn_B1).double() - scaled_BV.amax(1, keepdim=True).double()
    return drawn_B1[:, 0], (shifted_B1 - total_B1.log())[:, 0]


def _most_likely(weights_BV: Tensor, top_k: int) -> Tensor:
    """bool [B, V], True for the `top_k` most likely tokens; ties by lowest id."""
    least_B1 = largest(weights_BV, top_k)[0][:, -1:]
    is_above_BV, is_tied_BV = weights_BV > least_B1, weights_BV == least_B1
    num_tied_B1 = top_k - is_above_BV.sum(1, keepdim=True)
    return is_above_BV | (is_tied_BV & (is_tied_BV.cumsum(1) <= num_tied_B1))


def _nucleus(weights_BV: Tensor, top_p: float) -> Tensor:
    """bool [B, V], True for the most likely tokens whose mass first reaches `top_p`; ties by lowest id."""
    wanted_B1 = top_p * weights_BV.sum(1, keepdim=True, dtype=torch.float64)
    size_B1 = torch.zeros_like(wanted_B1, dtype=torch.int64)
    least_B1 = torch.zeros_like(weights_BV[:, :1])
    rows = torch.arange(len(weights_BV), device=weights_BV.device)
    width = weights_BV.shape[1]
    for num_top in _growing(min(NUCLEUS_START, width), width):
        top_RK, _ = largest(weights_BV[rows], num_top)
        mass_RK = top_RK.cumsum(1, dtype=torch.float64)
        last_R1 = (mass_RK < wanted_B1[rows]).sum(1, keepdim=True).clamp(max=num_top - 1)
        size_B1[rows], least_B1[rows] = last_R1 + 1, top_RK.gather(1, last_R1)
        rows = rows[mass_RK[:, -1] < wanted_B1[rows, 0]]
        if not len(rows):
            break
    is_above_BV, is_tied_BV = weights_BV > least_B1, weights_BV == least_B1
    num_tied_B1 = size_B1 - is_above_BV.sum(1, keepdim=True)
    return is_above_BV | (is_tied_BV & (is_tied_BV.cumsum(1) <= num_tied_B1))


def _growing(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 8
    yield last


def _lowest_argmax(logits_BV: Tensor) -> Tensor:
    """The most likely id; the lowest one of several that tie, which `argmax` does not promise."""
    ids_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    is_largest_BV = logits_BV == logits_BV.amax(1, keepdim=True)
    return torch.where(is_largest_BV, ids_V, logits_BV.shape[1]).amin(1)


def _check_finite(entropies_B: Tensor, running: Sequence[Row]) -> None:
    """NaN and +inf logits make the whole distribution NaN, so its entropy shows them."""
    for row, is_bad in zip(running, entropies_B.isnan().tolist(), strict=True):
        if is_bad and not row.is_finished:
            raise EngineError(
                f"the logits of rollout {row.key} at response position {len(row.ids)} are NaN or infinite: "
                f"the weights are damaged, or the model overflows in its number format; try dtype float32"
            )
