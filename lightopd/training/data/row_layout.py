"""How the rollouts of a micro-batch lie in its rows: one in each, or several end to end."""

# R = rollouts in a micro-batch, B = its rows, T = their length, P = rollouts of a step
# G = rollouts that stay together, U = P / G of such groups

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Places of the rollouts in a micro-batch of [B, T] tokens."""

    starts_R: Integers
    """Place of each rollout's first token in the flattened [B * T]."""
    num_rows: int
    width: int
    """T."""

    @property
    def num_padded(self) -> int:
        """Tokens of the micro-batch, padding included."""
        return self.num_rows * self.width


def lay_out(lengths_R: NDArray[np.integer], row_tokens: int | None = None) -> RowLayout:
    """Give every rollout a row of its own, or the first row of `row_tokens` that has room for it."""
    if row_tokens is None:
        width = int(lengths_R.max())
        return RowLayout(np.arange(len(lengths_R)) * width, len(lengths_R), width)
    rows = _Rows(row_tokens, len(lengths_R))
    starts = [rows.add(int(length)) for length in lengths_R]
    return RowLayout(np.array(starts, dtype=np.int64), rows.num_used, row_tokens)


def fill(lengths_UG: NDArray[np.integer], budget: int, row_tokens: int | None) -> Iterator[Integers]:
    """Divide groups into micro-batches of at most `budget` padded tokens, long ones first.

    Args:
        lengths_UG: tokens of each rollout, by group; no group is larger than the budget in rows of its own.
        budget: most padded tokens of a micro-batch.
        row_tokens: length of rows that rollouts share, no less than any rollout; None where each has its own.

    Yields:
        Numbers of groups; laid out in this order they keep the budget.
    """
    longest_U = lengths_UG.max(1)
    descending = np.argsort(-longest_U, kind="stable")
    while len(descending):
        if row_tokens is None:
            num_units = budget // lengths_UG.shape[1] // int(longest_U[descending[0]])
            is_in = np.arange(len(descending)) < num_units
        else:
            is_in = _first_fit(lengths_UG[descending], row_tokens, budget // row_tokens)
        yield descending[is_in]
        descending = descending[~is_in]


def _first_fit(lengths_UG: NDArray[np.integer], width: int, num_rows: int) -> NDArray[np.bool_]:
    """Which groups, in descending order of their longest rollouts, find room in so many rows."""
    longest_U = lengths_UG.max(1)
    rows = _Rows(width, num_rows)
    is_in_U = np.zeros(len(lengths_UG), dtype=np.bool_)
    unit = 0
    while unit < len(lengths_UG):
        is_in_U[unit] = rows.add_all(lengths_UG[unit])
        unit += 1
        if not is_in_U[unit - 1]:
            # The order lets all those be passed over whose longest rollout is longer than any room.
            unit = max(unit, int(np.searchsorted(-longest_U, -rows.most_room)))
    return is_in_U


class _Rows:
    """Rows of one length that are filled from the left."""

    def __init__(self, width: int, num_rows: int) -> None:
        self.width = width
        self.room_B = np.full(num_rows, width)

    @property
    def num_used(self) -> int:
        return int(np.count_nonzero(self.room_B < self.width))

    @property
    def most_room(self) -> int:
        return int(self.room_B.max())

    def add(self, length: int) -> int:
        """Put a rollout into the first row with room for it; returns its place, -1 when there is none."""
        row = int(np.argmax(self.room_B >= length))
        if self.room_B[row] < length:
            return -1
        start = (row + 1) * self.width - int(self.room_B[row])
        self.room_B[row] -= length
        return start

    def add_all(self, lengths_G: NDArray[np.integer]) -> bool:
        """Put all rollouts of a group into rows, or none."""
        before_B = self.room_B.copy()
        if all(self.add(int(length)) >= 0 for length in lengths_G):
            return True
        self.room_B = before_B
        return False
