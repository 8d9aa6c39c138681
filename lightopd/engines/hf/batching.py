"""Which sequences go through the model together."""

from collections.abc import Sequence

import numpy as np

BATCH_COST_SHARE = 1 / 32
"""What one more batch costs, as a share of a full batch's tokens; more padding than that is worth a split."""


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of at most `batch_tokens` padded tokens, longest first.

    Of all ways to cut the sequences, sorted by length, into batches, the cheapest: padded tokens, and a price
    for each batch. A sequence longer than the budget is a batch of its own. The longest come first, so a
    budget that is too large for the memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    longest = np.array([lengths[index] for index in order], dtype=np.int64)
    costs = np.zeros(len(order) + 1)
    starts = [0]
    first = 0
    for end in range(1, len(order) + 1):
        while first < end - 1 and (end - first) * longest[first] > batch_tokens:
            first += 1
        # Places where the batch that ends here may start, the latest first: earlier batches are fuller then.
        places = np.arange(end - 1, first - 1, -1)
        totals = costs[places] + (end - places) * longest[places]
        best = int(totals.argmin())
        costs[end] = totals[best] + batch_tokens * BATCH_COST_SHARE
        starts.append(int(places[best]))
    return _cut(order, starts)


def _cut(order: Sequence[int], starts: Sequence[int]) -> list[list[int]]:
    """The batches, given where the batch before each place starts."""
    batches: list[list[int]] = []
    end = len(order)
    while end > 0:
        batches.append(list(order[starts[end] : end]))
        end = starts[end]
    return batches[::-1]
