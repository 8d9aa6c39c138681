"""What a top-k keeps of whole teachers, and the KL that its rebuilding loses; for `signal_bytes.py`."""

# N = response tokens, V = vocabulary, C = kept entries of all positions end to end, S = supports; nats

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 128
"""Positions that are looked at together."""
WIDEST = 1024
"""Most entries at a position."""


@dataclass(frozen=True, slots=True)
class Teachers:
    """Whole-vocabulary log-probabilities of response tokens, and where the responses begin."""

    logprobs_NV: NDArray[np.float32]
    sampled_N: NDArray[np.int32]
    lengths_R: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Support:
    """Which entries are kept: all above `min_probability`, and at most `top_k`."""

    top_k: int = WIDEST
    min_probability: float = 0.0

    @property
    def name(self) -> str:
        return f"p > {self.min_probability:.0e}" if self.min_probability else f"top-{self.top_k}"


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries best first within a position, as a shard has them, and the mass outside."""

    counts_N: NDArray[np.int64]
    ids_C: NDArray[np.int32]
    logprobs_C: NDArray[np.float32]
    tails_N: NDArray[np.float32]
    sampled_logprobs_N: NDArray[np.float32]
    lengths_R: NDArray[np.int64]

    @property
    def position_C(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(self.counts_N)), self.counts_N)


def load_teachers(folder: Path, part: str) -> Teachers:
    """One part of the samples that `signal_bytes.py` scored, memory-mapped."""
    rest = np.load(folder / f"{part}.npz")
    return Teachers(np.load(folder / f"{part}.npy", mmap_mode="r"), rest["ids"], rest["lengths"])


def synthetic_teachers(spread: float, num: int, vocabulary: int, seed: int) -> Teachers:
    """Zipf's law over the vocabulary, and noise of `spread` nats on every logit: 3.5 is peaked, 2 is flat."""
    random = np.random.default_rng(seed)
    base_V = -np.log(np.arange(1, vocabulary + 1, dtype=np.float32))
    logits_NV = random.standard_normal((num, vocabulary), np.float32)
    logits_NV *= spread
    logits_NV += base_V
    logprobs_NV = torch.from_numpy(logits_NV).log_softmax(1)
    sampled_N = torch.multinomial(logprobs_NV.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return Teachers(logprobs_NV.numpy(), sampled_N.int().numpy(), np.full(num // 256, 256))


def keep(teachers: Teachers, widest_ids_NK: NDArray, widest_NK: NDArray, support: Support) -> Kept:
    """The entries of a support, out of each position's `WIDEST`."""
    num = len(widest_NK)
    is_kept_NK = np.arange(widest_NK.shape[1])[None] < support.top_k
    is_kept_NK = is_kept_NK & (np.exp(widest_NK) >= support.min_probability)
    mass_N = (np.exp(widest_NK.astype(np.float64)) * is_kept_NK).sum(1)
    return Kept(
        is_kept_NK.sum(1),
        widest_ids_NK[is_kept_NK],
        widest_NK[is_kept_NK],
        np.log1p(-mass_N.clip(max=1 - 1e-9)).astype(np.float32),
        np.asarray(teachers.logprobs_NV[np.arange(num), teachers.sampled_N]),
        teachers.lengths_R,
    )


def widest(teachers: Teachers) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probabilities [N, WIDEST], best first."""
    found = [
        torch.from_numpy(np.array(teachers.logprobs_NV[start : start + BLOCK])).topk(WIDEST)
        for start in range(0, len(teachers.logprobs_NV), BLOCK)
    ]
    return (
        torch.cat([each.indices for each in found]).int().numpy(),
        torch.cat([each.values for each in found]).numpy(),
    )


def shapes(teachers: Teachers, supports: Sequence[Support]) -> Tensor:
    """Shape of the tail by support, float64 [S, V]: the mean of the probabilities outside, scaled to one."""
    ids_NK, logprobs_NK = widest(teachers)
    kept = [keep(teachers, ids_NK, logprobs_NK, support) for support in supports]
    sums_V = np.zeros(teachers.logprobs_NV.shape[1])
    for start in range(0, len(ids_NK), BLOCK):
        sums_V += np.exp(np.asarray(teachers.logprobs_NV[start : start + BLOCK], np.float64)).sum(0)
    found = []
    for one in kept:
        inside_V = np.bincount(one.ids_C, np.exp(one.logprobs_C.astype(np.float64)), len(sums_V))
        outside_V = (sums_V - inside_V).clip(min=1e-12)
        found.append(torch.from_numpy(outside_V / outside_V.sum()))
    return torch.stack(found)


@dataclass(frozen=True, slots=True)
class Measure:
    """Sums over the vocabulary that every rebuilding needs, made once: T log T, and T log c by shape."""

    shapes_SV: Tensor
    own_N: NDArray[np.float64]
    under_shapes_NS: NDArray[np.float64]

    @classmethod
    def of(cls, teachers: Teachers, shapes_SV: Tensor) -> "Measure":
        logs_VS, own, under = shapes_SV.log().T.contiguous(), [], []
        for start in range(0, len(teachers.logprobs_NV), BLOCK):
            logprobs_BV = torch.from_numpy(np.array(teachers.logprobs_NV[start : start + BLOCK])).double()
            probs_BV = logprobs_BV.exp()
            own.append((probs_BV * logprobs_BV).sum(1))
            under.append(probs_BV @ logs_VS)
        return cls(shapes_SV, torch.cat(own).numpy(), torch.cat(under).numpy())

    def kl_lost(self, exact: Kept, stored: Kept, shape: int | None) -> float:
        """Mean KL(teacher || rebuilt) over the whole vocabulary.

        Kept entries and tail are scaled to sum to one; the tail lies by a shape, or evenly where it is None.
        """
        place, num = exact.position_C, len(exact.counts_N)
        vocabulary = self.shapes_SV.shape[1]

        def summed(values_C: NDArray) -> NDArray[np.float64]:
            return np.bincount(place, values_C, num)

        exact_C = exact.logprobs_C.astype(np.float64)
        probs_C, stored_C = np.exp(exact_C), stored.logprobs_C.astype(np.float64)
        tails_N = stored.tails_N.astype(np.float64)
        total_N = np.log(summed(np.exp(stored_C)) + np.exp(tails_N))
        inside_N = summed(probs_C * (exact_C - stored_C)) + summed(probs_C) * total_N
        outside_N = 1 - summed(probs_C)
        own_N = self.own_N - summed(probs_C * exact_C)
        if shape is None:
            lies_N, free_N = np.zeros(num), vocabulary - exact.counts_N
        else:
            shape_C = self.shapes_SV[shape].numpy()[exact.ids_C]
            lies_N = self.under_shapes_NS[:, shape] - summed(probs_C * np.log(shape_C))
            free_N = 1 - summed(shape_C)
        rebuilt_N = lies_N + outside_N * (tails_N - total_N - np.log(free_N))
        return float((inside_N + own_N - rebuilt_N).mean())
