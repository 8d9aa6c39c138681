"""How much the most likely tokens of the student at rollout and of a teacher have in common.

Semi-OPD (arXiv 2610.11291) beat live distillation from one cache in most pairs of models, and lost where the
two top-64 had much in common from the start. The named query `overlap` is the same sum in SQL.
"""

# N = trained tokens, K = entries of a signal at a position

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import SignalColumns, read_shard_columns
from lightopd.cache.store import Cache

TOP = 64
"""Most likely tokens of each signal that are compared, where both keep so many."""


class Overlap(NamedTuple):
    """Two signals at the trained tokens where both have entries; means over these."""

    top_k: int
    """Most likely tokens that were compared."""
    share: float
    """Tokens in common over the tokens of the one that has fewer."""
    teacher_mass: float
    """Probability that the teacher gives to the common tokens."""
    student_mass: float
    """Probability that the student at rollout gives to them."""
    quarters: tuple[float, ...]
    """The share by quarter of the response, from its beginning; NaN where no token is."""


class _Tokens(NamedTuple):
    """What both signals say at the trained tokens of a shard."""

    share_N: NDArray[np.floating]
    teacher_mass_N: NDArray[np.floating]
    student_mass_N: NDArray[np.floating]
    quarter_N: NDArray[np.int64]


def measured_overlap(cache: Cache, teacher: str, student: str, shards: list[int]) -> Overlap | None:
    """Overlap of two loaded signals over some shards; None where no trained token has entries of both.

    Args:
        cache: complete, with both signals.
        teacher: signal of the teacher.
        student: signal of the student at rollout.
        shards: numbers of shards that are read.

    Raises:
        CacheError: a file is damaged.
    """
    top_k = min(TOP, *(cache.signals[name].manifest.top_k for name in (teacher, student)))
    found = list(_by_shard(cache, teacher, student, shards, top_k))
    if not sum(len(tokens.share_N) for tokens in found):
        return None
    tokens = _Tokens(*(np.concatenate(column) for column in zip(*found, strict=True)))
    is_in_QN = tokens.quarter_N == np.arange(4)[:, None]
    quarters = [float(tokens.share_N[is_in_N].mean()) if is_in_N.any() else np.nan for is_in_N in is_in_QN]
    share, teacher_mass, student_mass = (float(values_N.mean()) for values_N in tokens[:3])
    return Overlap(top_k, share, teacher_mass, student_mass, tuple(quarters))


def _by_shard(cache: Cache, teacher: str, student: str, shards: list[int], top_k: int) -> Iterator[_Tokens]:
    for shard in shards:
        columns = read_shard_columns(cache, shard, [teacher, student], topk=[teacher, student])
        lengths_R = np.diff(columns.offsets)
        place_N = np.arange(columns.offsets[-1]) - np.repeat(columns.offsets[:-1], lengths_R)
        quarter_N = 4 * place_N // np.repeat(lengths_R, lengths_R)
        pair = columns.signals[teacher], columns.signals[student]
        one_C, other_C = (_top_keys(each, top_k, cache.manifest.vocabulary_size) for each in pair)
        yield _compare(one_C, other_C, columns.loss_mask_N, quarter_N, cache.manifest.vocabulary_size)


class _Keys(NamedTuple):
    """Entries of a signal, one number for each position and token, and their probabilities."""

    keys_C: NDArray[np.int64]
    probabilities_C: NDArray[np.float64]
    counts_N: NDArray[np.int64]


def _top_keys(signal: SignalColumns, top_k: int, width: int) -> _Keys:
    assert signal.topk_offsets is not None
    assert signal.topk_ids_C is not None
    assert signal.topk_logprobs_C is not None
    counts_N = np.diff(signal.topk_offsets)
    place_C = np.repeat(np.arange(len(counts_N)), counts_N)
    rank_C = np.arange(len(place_C)) - signal.topk_offsets[:-1][place_C]
    is_top_C = rank_C < top_k
    keys_C = place_C[is_top_C] * width + signal.topk_ids_C[is_top_C]
    probabilities_C = np.exp(signal.topk_logprobs_C[is_top_C].astype(np.float64))
    return _Keys(keys_C, probabilities_C, np.minimum(counts_N, top_k))


def _compare(
    teacher: _Keys, student: _Keys, loss_mask_N: NDArray[np.bool_], quarter_N: NDArray[np.int64], width: int
) -> _Tokens:
    common_C, of_teacher_C, of_student_C = np.intersect1d(
        teacher.keys_C, student.keys_C, assume_unique=True, return_indices=True
    )
    place_C, size = common_C // width, len(loss_mask_N)
    shared_N = np.bincount(place_C, minlength=size)
    teacher_N, student_N = np.zeros(size), np.zeros(size)
    np.add.at(teacher_N, place_C, teacher.probabilities_C[of_teacher_C])
    np.add.at(student_N, place_C, student.probabilities_C[of_student_C])
    fewer_N = np.minimum(teacher.counts_N, student.counts_N)
    is_told_N = loss_mask_N & (fewer_N > 0)
    return _Tokens(
        shared_N[is_told_N] / fewer_N[is_told_N],
        teacher_N[is_told_N],
        student_N[is_told_N],
        quarter_N[is_told_N],
    )
