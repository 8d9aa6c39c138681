"""Makes samples and scores of the log-probabilities that vLLM answers with, and refuses what is not whole.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely),
V = vocabulary; nats throughout.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lightopd.errors import EngineError
from lightopd.schemas.records import Floats, Ids, RolloutSignal, Sample

TAIL_ROUNDING = 2.0**-20
"""Float32 rounding of 1 - sum over the top-k: a smaller tail cannot be read off it."""


def scores_of(
    name: str,
    response_ids: Ids,
    ids_RM: Ids,
    logprobs_RM: Floats,
    min_probability: float,
    vocabulary_size: int,
) -> RolloutSignal:
    """Scores of one response; the tail is derived, see `derived_tail`.

    Args:
        name: of the sequence, for messages.
        response_ids: int32 [R].
        ids_RM: int32, at each position the response token, then the K most likely tokens.
        logprobs_RM: float32, their log-probabilities over the whole vocabulary.
        min_probability: less likely entries are left to the tail.
        vocabulary_size: V.

    Raises:
        EngineError: another token than the response's stands first, ids lie outside the vocabulary, or a
            log-probability is NaN or above 0.
    """
    _check_entries(name, response_ids, ids_RM, logprobs_RM, vocabulary_size)
    own_R, ids_RK, topk_RK = logprobs_RM[:, 0], ids_RM[:, 1:], logprobs_RM[:, 1:]
    if (np.diff(topk_RK, axis=1) > 0).any():
        order_RK = np.argsort(-topk_RK, axis=1, kind="stable")
        ids_RK = np.take_along_axis(ids_RK, order_RK, 1)
        topk_RK = np.take_along_axis(topk_RK, order_RK, 1)
    is_own_RK = ids_RK == response_ids[:, None]
    is_kept_RK = np.exp(topk_RK) >= min_probability
    outside_R = np.where(is_own_RK.any(1), -np.inf, own_R)
    return RolloutSignal(
        logprobs=own_R,
        topk_counts=is_kept_RK.sum(1, dtype=np.int32),
        topk_ids=ids_RK[is_kept_RK],
        topk_logprobs=topk_RK[is_kept_RK],
        tail_logprobs=derived_tail(topk_RK, is_kept_RK, outside_R, vocabulary_size),
    )


def derived_tail(
    topk_RK: Floats, is_kept_RK: NDArray[np.bool_], outside_R: Floats, vocabulary_size: int
) -> Floats:
    """Log of the mass outside the kept entries, float32 [R]: 1 - their sum, in float64.

    Three things are known besides that difference, and bound it: the V - K tokens outside are no likelier
    than the last entry each; a token seen outside is a part of the tail; and rounding hides what is smaller
    than `TAIL_ROUNDING`, so that less is never claimed from the difference alone. With K = V nothing is
    outside and the tail is exact.

    Args:
        topk_RK: log-probabilities, largest first.
        is_kept_RK: False where an entry was left to the tail, which then holds its exact mass.
        outside_R: log-probability of a token seen outside the top-k, -inf where there is none.
        vocabulary_size: V.
    """
    mass_RK = np.exp(topk_RK.astype(np.float64))
    num_outside = vocabulary_size - topk_RK.shape[1]
    last_R = mass_RK[:, -1] if mass_RK.shape[1] else np.ones(len(mass_RK))
    tail_R = np.minimum(np.maximum(1.0 - mass_RK.sum(1), TAIL_ROUNDING), num_outside * last_R)
    tail_R = np.maximum(tail_R, np.exp(outside_R.astype(np.float64)))
    tail_R += np.where(is_kept_RK, 0.0, mass_RK).sum(1)
    with np.errstate(divide="ignore"):
        logs_R: Floats = np.log(np.minimum(tail_R, 1.0)).astype(np.float32)
    return logs_R


def sample_of(
    name: str,
    ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    limit: int,
    stop_ids: Collection[int],
    vocabulary_size: int,
    *,
    is_at_string: bool = False,
) -> Sample:
    """One drawn response, without entropies: vLLM does not tell them.

    Args:
        name: of the rollout, for messages.
        ids: of the response, the end token included.
        logprobs: of those ids, raw.
        finish_reason: `stop` or `length`, as vLLM says it.
        limit: tokens that were asked for.
        stop_ids: ids that end a response.
        vocabulary_size: V.
        is_at_string: the last id completes a text that ends a response.

    Raises:
        EngineError: a log-probability is missing, NaN or above 0, an id lies outside the vocabulary, or the
            response ended neither at an end token nor at the limit.
    """
    response_ids, drawn = np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32)
    if len(response_ids) == 0 or len(drawn) != len(response_ids):
        raise EngineError(
            f"{name} came back with {len(response_ids)} tokens and {len(drawn)} log-probabilities"
        )
    _check_entries(name, response_ids, response_ids[:, None], drawn[:, None], vocabulary_size)
    ended = is_at_string or int(response_ids[-1]) in stop_ids
    whole = ended if finish_reason == "stop" else finish_reason == "length" and len(response_ids) == limit
    if not whole:
        raise EngineError(
            f"{name} ended after {len(response_ids)} of {limit} tokens with id {response_ids[-1]} "
            f"({finish_reason}), which is no end token of the tokenizer: vLLM has a stop or a token limit of "
            f"its own; start it with --generation-config vllm"
        )
    return Sample(response_ids, drawn, None, "stop" if ended else "length")


def _check_entries(
    name: str, response_ids: Ids, ids_RM: Ids, logprobs_RM: Floats, vocabulary_size: int
) -> None:
    is_other_R = ids_RM[:, 0] != response_ids
    if is_other_R.any():
        place = int(is_other_R.argmax())
        raise EngineError(
            f"{name}: the log-probability at response position {place} is of token {ids_RM[place, 0]}, the "
            f"response has {response_ids[place]} there: vLLM read other tokens than it was sent"
        )
    if ids_RM.size and not 0 <= ids_RM.min() <= ids_RM.max() < vocabulary_size:
        raise EngineError(
            f"{name}: vLLM names token {ids_RM.max()}, the model's vocabulary has {vocabulary_size}; it "
            f"serves another model than the one given"
        )
    is_broken_R = (~(logprobs_RM <= 1e-4)).any(1)
    if is_broken_R.any():
        raise EngineError(
            f"the logits of {name} at response position {int(is_broken_R.argmax())} are NaN or infinite: the "
            f"weights are damaged, or the model overflows in its number format; try dtype float32"
        )
