"""Which of the teacher's answers to a prompt is trained on (BRTS, arXiv 2605.09725).

R = rollouts, N = their response tokens laid end to end, K = compared entries; numpy.
"""

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns, SignalColumns
from lightopd.errors import CacheError
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.rollout_table import Floats, Measure, RolloutTable, group_numbers, means
from lightopd.objectives.parts.columns import Bools
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.weights import BestOfSelection

CHUNK = 1 << 16
"""Positions compared at a time; each takes K * K bytes."""


def needs_best_of(config: BestOfSelection, term: TermConfig | None) -> Needs:
    """The top-k of teacher and student at rollout."""
    both = (config.signal, config.student_signal)
    return Needs(signals=both, topk=both)


def best_of_measures(config: BestOfSelection, term: TermConfig | None) -> dict[str, Measure]:
    """Mean share of the two top-k that is common."""

    def overlap(view: ShardColumns) -> Floats:
        teacher, student = view.signals[config.signal], view.signals[config.student_signal]
        return means(view, overlaps(_top(teacher, config.top_k), _top(student, config.top_k)))

    return {"overlap": overlap}


def select_best_of(config: BestOfSelection, table: RolloutTable) -> Bools:
    """All rollouts of the student; of each prompt's answers of the teacher the best one.

    Correct before others, then by overlap, then by id, so that the order of the cache decides nothing.

    Raises:
        CacheError: no row is the teacher's.
    """
    is_teacher_R = table.origins_R == "teacher"
    if not is_teacher_R.any():
        raise CacheError(
            "selection best_of chooses among the teacher's answers, and this cache has none; make it with "
            "`lightopd join ANSWERS ROLLOUTS`"
        )
    keep_R, group_R = ~is_teacher_R, group_numbers(table)
    best_first = np.lexsort((table.rollout_ids, -table.measures["overlap"], ~table.is_correct_R, group_R))
    answers = best_first[is_teacher_R[best_first] & (table.lengths_R[best_first] > 0)]
    keep_R[answers[np.unique(group_R[answers], return_index=True)[1]]] = True
    return np.asarray(keep_R)


def overlaps(one_NK: NDArray[np.int64], other_NK: NDArray[np.int64]) -> Floats:
    """Common ids over the smaller number of ids at each position, [N]; 0 where one has none."""
    shared_N = np.zeros(len(one_NK))
    for begin in range(0, len(one_NK), CHUNK):
        one_CK1, other_C1K = one_NK[begin : begin + CHUNK, :, None], other_NK[begin : begin + CHUNK, None, :]
        shared_N[begin : begin + CHUNK] = ((one_CK1 == other_C1K) & (one_CK1 >= 0)).sum((1, 2))
    size_N = np.minimum((one_NK >= 0).sum(1), (other_NK >= 0).sum(1))
    return np.asarray(shared_N / np.maximum(size_N, 1))


def _top(signal: SignalColumns, top_k: int) -> NDArray[np.int64]:
    """The most likely ids of each position, -1 where there are fewer, [N, K]."""
    assert signal.topk_offsets is not None, "needs_best_of asks for it"
    assert signal.topk_ids_C is not None, "needs_best_of asks for it"
    place_NK = signal.topk_offsets[:-1, None] + np.arange(top_k)
    is_there_NK = place_NK < signal.topk_offsets[1:, None]
    ids_NK = signal.topk_ids_C[np.where(is_there_NK, place_NK, 0)] if len(signal.topk_ids_C) else place_NK
    return np.where(is_there_NK, ids_NK, -1).astype(np.int64)
