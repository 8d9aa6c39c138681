"""What each choice of a signal would keep, lose and cost, on a scored sample; and the one that is named.

The rule: of the choices that lose at most `LARGEST_LOSS_NATS` of the teacher, with the tail by its shape, the
one with the fewest bytes; where none does, the one that loses least.
"""

# N = response tokens, V = vocabulary, C = kept entries of all positions end to end; nats throughout

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from lightopd.cache.shards import shard_bytes
from lightopd.cache.signals.rounding import rounded, rounded_tails
from lightopd.cache.tables import scores_to_table
from lightopd.schemas.records import RolloutSignal

LARGEST_LOSS_NATS = 0.1
"""KL(teacher || what is rebuilt), nats a token, that the named choice may lose."""
WIDEST = 1024
"""Entries of a position that are scored for the sample."""
PRECISION = "eighths"
"""`topk_dtype` whose loss is told, and which is named."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Entries of a signal: the `top_k` most likely, those below `min_probability` left out."""

    name: str
    top_k: int
    min_probability: float = 0.0

    @property
    def settings(self) -> str:
        """As flags of `precompute`."""
        threshold = f" --set min_probability={self.min_probability:g}" if self.min_probability else ""
        return f"--top-k {self.top_k}{threshold}" + (f" --set topk_dtype={PRECISION}" if self.top_k else "")


CHOICES = (
    Choice("sampled", 0),
    *(Choice(f"top-{top_k}", top_k) for top_k in (32, 64, 128)),
    *(Choice(f"p > {p:g}", WIDEST, p) for p in (3e-3, 1e-3, 5e-4, 3e-4, 1e-4)),
)


@dataclass(frozen=True, slots=True)
class Whole:
    """What is known of the teacher beyond its entries, over the positions of some responses."""

    sums_V: NDArray[np.float64]
    """Probabilities added up over positions."""
    negentropy: float = 0.0
    """Sum over positions and vocabulary of T log T."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Scored responses: `measured` tells size and loss, `calibration` made the shape of the tail."""

    ids: Sequence[str]
    measured: Sequence[RolloutSignal]
    """With `WIDEST` entries at a position, or as many as the engine gives."""
    whole: Whole | None
    """None where the engine sees the most likely tokens only: what is lost is not known."""
    calibration: Sequence[RolloutSignal] = ()
    """Other responses than those measured; none where there are too few."""
    calibration_whole: Whole | None = None
    hidden_loss: float | None = None
    """KL that hidden states in int8 lose, nats a token; None where it is not known."""


def fitting(scores: Sequence[RolloutSignal], vocabulary: int) -> list[Choice]:
    """The choices that the sample's entries can tell; a threshold must lie above the last of a position."""
    widest, lowest = (
        min((int(each.topk_counts.min()) for each in scores if len(each.logprobs)), default=0),
        -np.inf,
    )
    if 0 < widest < vocabulary:
        lowest = max(float(each.topk_logprobs[np.cumsum(each.topk_counts) - 1].max()) for each in scores)
    told = [replace(each, top_k=min(each.top_k, vocabulary)) for each in CHOICES if each.min_probability]
    fixed = [each for each in CHOICES if not each.min_probability and each.top_k <= widest]
    return fixed + [each for each in told if widest and lowest < np.log(each.min_probability)]


def choice_row(choice: Choice, sample: Sample) -> dict[str, JsonValue]:
    """Entries and bytes a token, and what is lost; None for what is not known."""
    kept = [cut(each, choice) for each in sample.measured]
    num = max(1, sum(len(each.logprobs) for each in kept))
    has_shape = sample.calibration_whole is not None
    return {
        "choice": choice.name,
        "entries": round(sum(len(each.topk_ids) for each in kept) / num, 1),
        "bytes_float16": round(_size(sample.ids, kept, "float16") / num, 1),
        f"bytes_{PRECISION}": round(_size(sample.ids, kept, PRECISION) / num, 1),
        "kl_uniform": _lost(choice, sample, kept, None) if choice.top_k else None,
        "kl_shaped": _lost(choice, sample, kept, _shape(choice, sample))
        if choice.top_k and has_shape
        else None,
    }


def named(rows: Sequence[dict[str, JsonValue]]) -> str | None:
    """The choice that the rule names; None where what is lost is not known."""
    known = [(_loss(row), float(str(row[f"bytes_{PRECISION}"])), str(row["choice"])) for row in rows]
    known = [each for each in known if each[0] is not None]
    if not known:
        return None
    enough = [each for each in known if each[0] is not None and each[0] <= LARGEST_LOSS_NATS]
    return min(enough, key=lambda each: each[1])[2] if enough else min(known)[2]


def _loss(row: dict[str, JsonValue]) -> float | None:
    value = row["kl_uniform"] if row["kl_shaped"] is None else row["kl_shaped"]
    return None if value is None else float(str(value))


def cut(scores: RolloutSignal, choice: Choice) -> RolloutSignal:
    """The entries of a choice, and the mass outside them."""
    counts_N = scores.topk_counts.astype(np.int64)
    place_C = np.repeat(np.arange(len(counts_N)), counts_N)
    rank_C = np.arange(len(place_C)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    is_kept_C = rank_C < choice.top_k
    is_kept_C &= scores.topk_logprobs >= (
        np.log(choice.min_probability) if choice.min_probability else -np.inf
    )
    probs_C = np.exp(scores.topk_logprobs.astype(np.float64))
    lost_N = np.bincount(place_C, probs_C * ~is_kept_C, len(counts_N)) + np.exp(
        scores.tail_logprobs.astype(np.float64)
    )
    with np.errstate(divide="ignore"):
        tails_N = np.log(np.minimum(lost_N, 1))
    return replace(
        scores,
        topk_counts=np.bincount(place_C, is_kept_C, len(counts_N)).astype(np.int32),
        topk_ids=scores.topk_ids[is_kept_C],
        topk_logprobs=scores.topk_logprobs[is_kept_C],
        tail_logprobs=tails_N.astype(np.float32),
    )


def _size(ids: Sequence[str], kept: Sequence[RolloutSignal], dtype: str) -> int:
    return len(shard_bytes(scores_to_table(ids, kept, dtype), kind="trial", fingerprint=""))


def _shape(choice: Choice, sample: Sample) -> NDArray[np.float64]:
    """The mean of the probabilities outside, over the calibration's responses; float64 [V]."""
    assert sample.calibration_whole is not None
    kept = [cut(each, choice) for each in sample.calibration]
    outside_V = _outside(sample.calibration_whole.sums_V, kept)
    shape_V: NDArray[np.float64] = outside_V / outside_V.sum()
    return shape_V


def _outside(sums_V: NDArray[np.float64], kept: Sequence[RolloutSignal]) -> NDArray[np.float64]:
    ids_C = np.concatenate([each.topk_ids for each in kept])
    probs_C = np.exp(np.concatenate([each.topk_logprobs for each in kept]).astype(np.float64))
    rest_V = sums_V - np.bincount(ids_C, probs_C, len(sums_V))
    least = np.finfo(np.float32).tiny  # a difference of two float sums may fall below zero
    return np.maximum(rest_V, least)


def _lost(
    choice: Choice, sample: Sample, kept: Sequence[RolloutSignal], shape_V: NDArray[np.float64] | None
) -> float | None:
    """Mean KL over the whole vocabulary; the tail lies by the shape, or evenly where it is None."""
    if sample.whole is None:
        return None
    counts_N = np.concatenate([each.topk_counts for each in kept]).astype(np.int64)
    ids_C = np.concatenate([each.topk_ids for each in kept])
    exact_C, tails_N = (
        np.concatenate([getattr(each, name) for each in kept]) for name in ("topk_logprobs", "tail_logprobs")
    )
    place_C = np.repeat(np.arange(len(counts_N)), counts_N)

    def summed(values_C: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(place_C, values_C, len(counts_N)).astype(np.float64)

    probs_C = np.exp(exact_C.astype(np.float64))
    stored_C = rounded(exact_C, PRECISION).astype(np.float64)
    stored_N = rounded_tails(tails_N, PRECISION).astype(np.float64)
    total_N = np.log(summed(np.exp(stored_C)) + np.exp(stored_N))
    inside = (probs_C * (exact_C - stored_C)).sum() + (summed(probs_C) * total_N).sum()
    own = sample.whole.negentropy - (probs_C * exact_C).sum()
    if shape_V is None:
        lies, free_N = 0.0, (len(sample.whole.sums_V) - counts_N).astype(np.float64)
    else:
        lies = float((_outside(sample.whole.sums_V, kept) * np.log(shape_V)).sum())
        free_N = 1 - summed(shape_V[ids_C])
    outside_N = np.exp(tails_N.astype(np.float64))
    is_there_N = outside_N > 0
    rest_N = outside_N[is_there_N] * (stored_N - total_N - np.log(np.maximum(free_N, 1e-300)))[is_there_N]
    return round(float((inside + own - lies - rest_N.sum()) / len(counts_N)), 4)
