"""Scores responses with transformers: sorted by length, in batches of a token budget, shared prompts once.

N = response positions of a batch, D = hidden size, K = top-k; nats throughout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightopd.cache.signals.channels import Channels
from lightopd.cache.signals.hidden import as_codes
from lightopd.engines.hf.batching import plan_batches
from lightopd.engines.hf.head_scores import (
    PendingScores,
    PositionScores,
    logit_slices,
    score_positions,
    score_support,
    support_ids,
    tail_sums,
)
from lightopd.engines.hf.hidden_states import num_inputs, plain_hidden, to_device
from lightopd.engines.hf.memory import fitting_tokens, free_bytes, memory_advice
from lightopd.engines.hf.shared_prompts import Group, hidden_of_groups, worthwhile_groups
from lightopd.errors import EngineError
from lightopd.models.load import LoadedModel
from lightopd.schemas import records
from lightopd.schemas.records import RolloutSignal, Support
from lightopd.under_way import so_far


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """How to score."""

    top_k: int
    min_probability: float
    batch_tokens: int
    """Padded tokens in one forward pass."""
    share_prompts: bool
    """Whether the model allows a prompt to be run once for all its responses."""
    keep: Literal["int8", "bfloat16"] | None = None
    """Format of the hidden states that the scores hold; None for none."""
    channels: Channels | None = None
    """Of int8: the statistics of the hidden states."""


@torch.inference_mode()
def score(
    loaded: LoadedModel, sequences: Sequence[records.Sequence], settings: ScoreSettings
) -> list[RolloutSignal]:
    """Scores of every sequence, in the order given.

    Raises:
        EngineError: NaN or +inf logits, or not enough memory for a batch.
    """
    settings = _fitting(loaded, settings)
    results = [_empty(loaded, settings)] * len(sequences)
    filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]
    done, total = 0, sum(len(sequences[index].response_ids) for index in filled)
    with memory_advice("score a batch", "engine.batch_tokens", settings.batch_tokens):
        for indices, scores in _one_behind(_scored(loaded, sequences, filled, settings)):
            _check_finite(scores, sequences, indices)
            for index, part in _split(scores, sequences, indices):
                results[index] = part
            done += sum(len(sequences[index].response_ids) for index in indices)
            so_far(f"{done:,} of {total:,} response tokens")
    return results


@torch.inference_mode()
def sum_tails(
    loaded: LoadedModel, sequences: Sequence[records.Sequence], settings: ScoreSettings
) -> NDArray[np.float64]:
    """Probabilities outside what `score` keeps, added up over all response tokens, [V].

    Raises:
        EngineError: not enough memory for a batch.
    """
    settings = _fitting(loaded, settings)
    filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]
    total_V = torch.zeros(len(loaded.head.weight_VD), dtype=torch.float64, device=loaded.device)
    with memory_advice("score a batch", "engine.batch_tokens", settings.batch_tokens):
        for _, hidden_ND in _batches(loaded, sequences, filled, settings):
            total_V += tail_sums(loaded.head, hidden_ND, settings.top_k, settings.min_probability)
    sums_V: NDArray[np.float64] = total_V.cpu().numpy()
    return sums_V


@torch.inference_mode()
def sum_negentropies(
    loaded: LoadedModel, sequences: Sequence[records.Sequence], settings: ScoreSettings
) -> float:
    """Sum of T log T over the vocabulary and all response tokens, nats.

    Raises:
        EngineError: not enough memory for a batch.
    """
    settings = _fitting(loaded, settings)
    filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]
    total = 0.0
    with memory_advice("score a batch", "engine.batch_tokens", settings.batch_tokens):
        for _, hidden_ND in _batches(loaded, sequences, filled, settings):
            for _, logits_CV in logit_slices(loaded.head, hidden_ND):
                logprobs_CV = logits_CV.log_softmax(1)
                finite_CV = logprobs_CV.clamp(min=torch.finfo(logprobs_CV.dtype).min)
                total += float((logprobs_CV.exp() * finite_CV).sum(dtype=torch.float64))
    return total


@torch.inference_mode()
def sum_hidden(
    loaded: LoadedModel, sequences: Sequence[records.Sequence], settings: ScoreSettings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hidden states and their squares, added up over all response tokens, [D] each.

    Raises:
        EngineError: not enough memory for a batch.
    """
    settings = _fitting(loaded, settings)
    filled = [index for index, sequence in enumerate(sequences) if len(sequence.response_ids)]
    size = loaded.head.weight_VD.shape[1]
    sums_2D = torch.zeros((2, size), dtype=torch.float64, device=loaded.device)
    with memory_advice("score a batch", "engine.batch_tokens", settings.batch_tokens):
        for _, hidden_ND in _batches(loaded, sequences, filled, settings):
            values_ND = hidden_ND.double()
            sums_2D += torch.stack([values_ND.sum(0), values_ND.square().sum(0)])
    found: NDArray[np.float64] = sums_2D.cpu().numpy()
    return found[0], found[1]


def _fitting(loaded: LoadedModel, settings: ScoreSettings) -> ScoreSettings:
    """Settings whose batches fit into the device's free memory."""
    free = free_bytes(loaded.device)
    if free is None:
        return settings
    return replace(settings, batch_tokens=min(settings.batch_tokens, fitting_tokens(loaded.model, free)))


def _scored(
    loaded: LoadedModel,
    sequences: Sequence[records.Sequence],
    indices: Sequence[int],
    settings: ScoreSettings,
) -> Iterator[tuple[list[int], PendingScores]]:
    for members, hidden_ND in _batches(loaded, sequences, indices, settings):
        ids_N = np.concatenate([sequences[index].response_ids for index in members]).astype(np.int64)
        supports = [sequences[index].support for index in members]
        yield members, _score(loaded, hidden_ND, ids_N, supports, settings)


def _one_behind(
    batches: Iterator[tuple[list[int], PendingScores]],
) -> Iterator[tuple[list[int], PositionScores]]:
    """Scores of each batch, waited for when the device has the work of the next one."""
    before: tuple[list[int], PendingScores] | None = None
    for batch in batches:
        if before is not None:
            yield before[0], before[1].arrived()
        before = batch
    if before is not None:
        yield before[0], before[1].arrived()


def _score(
    loaded: LoadedModel,
    hidden_ND: Tensor,
    ids_N: NDArray[np.int64],
    supports: Sequence[Support | None],
    settings: ScoreSettings,
) -> PendingScores:
    asked_N = to_device(ids_N, loaded.device)
    given = [support for support in supports if support is not None]
    if given:
        assert len(given) == len(supports), "all sequences of a call have a support, or none has"
        support_NS = support_ids(given, loaded.device)
        return score_support(loaded.head, hidden_ND, asked_N, support_NS, settings.top_k)
    kept = None if settings.keep is None else as_codes(hidden_ND, settings.channels)
    return score_positions(loaded.head, hidden_ND, asked_N, settings.top_k, settings.min_probability, kept)


def _empty(loaded: LoadedModel, settings: ScoreSettings) -> RolloutSignal:
    """Scores of an empty response, with hidden states where they are kept."""
    if settings.keep is None:
        return empty_scores()
    size = loaded.head.weight_VD.shape[1]
    codes = np.zeros((0, size), np.int8 if settings.keep == "int8" else np.uint16)
    scales = np.zeros(0, np.float32) if settings.keep == "int8" else None
    return replace(empty_scores(), hidden=codes, hidden_scales=scales)


def empty_scores() -> RolloutSignal:
    """Scores of an empty response."""
    floats, ids = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int32)
    return RolloutSignal(floats, ids, ids, floats, floats)


def _batches(
    loaded: LoadedModel,
    sequences: Sequence[records.Sequence],
    indices: Sequence[int],
    settings: ScoreSettings,
) -> Iterator[tuple[list[int], Tensor]]:
    """Every sequence once: batches of indices, and hidden states [N, D] that predict their responses."""
    groups: list[Group] = []
    alone = list(indices)
    if settings.share_prompts:
        groups, alone = worthwhile_groups(sequences, indices)
    yield from hidden_of_groups(loaded, sequences, groups, settings.batch_tokens)
    lengths = [num_inputs(sequences[index]) for index in alone]
    for places in plan_batches(lengths, settings.batch_tokens):
        members = [alone[place] for place in places]
        yield members, plain_hidden(loaded, [sequences[index] for index in members])


def _check_finite(
    scores: PositionScores, sequences: Sequence[records.Sequence], indices: Sequence[int]
) -> None:
    """NaN and +inf among the logits make the log-probability or the tail NaN."""
    is_bad_N = np.isnan(scores.logprobs_N) | np.isnan(scores.tail_logprobs_N)
    if not is_bad_N.any():
        return
    place = int(is_bad_N.argmax())
    for index in indices:
        length = len(sequences[index].response_ids)
        if place < length:
            raise EngineError(
                f"the logits of sequence {index} at response position {place} are NaN or infinite: the "
                f"weights are damaged, or the model overflows in its number format; try dtype float32"
            )
        place -= length


def _split(
    scores: PositionScores, sequences: Sequence[records.Sequence], indices: Sequence[int]
) -> Iterator[tuple[int, RolloutSignal]]:
    is_kept_NK = np.arange(scores.topk_ids_NK.shape[1]) < scores.topk_counts_N[:, None]
    start = 0
    for index in indices:
        rows = slice(start, start + len(sequences[index].response_ids))
        start = rows.stop
        part = RolloutSignal(
            logprobs=scores.logprobs_N[rows],
            topk_counts=scores.topk_counts_N[rows],
            topk_ids=scores.topk_ids_NK[rows][is_kept_NK[rows]],
            topk_logprobs=scores.topk_logprobs_NK[rows][is_kept_NK[rows]],
            tail_logprobs=scores.tail_logprobs_N[rows],
            hidden=None if scores.hidden_ND is None else scores.hidden_ND[rows],
            hidden_scales=None if scores.hidden_scales_N is None else scores.hidden_scales_N[rows],
        )
        yield index, part
