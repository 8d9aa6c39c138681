"""How sequences are cut into batches."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from lightopd.engines.hf.batching import BATCH_COST_SHARE, plan_batches


def padded(batches, lengths):
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def test_every_sequence_is_in_one_batch_and_the_longest_come_first():
    lengths = np.random.default_rng(0).integers(1, 100, 200).tolist()
    batches = plan_batches(lengths, 500)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(200))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(padded([batch], lengths) <= 500 for batch in batches)


def test_a_sequence_above_the_budget_is_alone():
    assert plan_batches([900, 10, 10], 100) == [[0], [1, 2]]


def test_nothing_makes_no_batch():
    assert plan_batches([], 100) == []


def test_equal_lengths_fill_the_budget():
    assert [len(batch) for batch in plan_batches([10] * 25, 100)] == [10, 10, 5]


def test_mixed_lengths_that_fit_into_one_batch_are_split_rather_than_padded():
    lengths = [300] * 2 + [20] * 20
    assert padded(plan_batches(lengths, 10_000), lengths) == sum(lengths)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_cut_is_cheaper(seed):
    budget = 64
    lengths = np.random.default_rng(seed).integers(1, 40, 9).tolist()
    ordered = sorted(lengths, reverse=True)
    cheapest = np.inf
    for count in range(9):
        for cuts in combinations(range(1, 9), count):
            edges = [0, *cuts, 9]
            sizes = [(b - a) * ordered[a] for a, b in pairwise(edges)]
            if all(s <= budget for s in sizes):
                cheapest = min(cheapest, sum(sizes) + budget * BATCH_COST_SHARE * len(sizes))
    batches = plan_batches(lengths, budget)
    assert padded(batches, lengths) + budget * BATCH_COST_SHARE * len(batches) == cheapest
