# R = response tokens, K = top-k, M = K + 1 entries, V = vocabulary

import asyncio
import math

import numpy as np
import pytest

from lightopd.engines.vllm.concurrency import LoopThread, run_all
from lightopd.engines.vllm.from_logprobs import TAIL_ROUNDING, derived_tail, sample_of, scores_of
from lightopd.errors import EngineError

V = 10


def rows(*positions):
    """Entries of each position from (id, probability) pairs, its own token first."""
    ids = np.array([[token for token, _ in position] for position in positions], dtype=np.int32)
    return ids, np.log(np.array([[p for _, p in position] for position in positions])).astype(np.float32)


def test_a_token_outside_the_topk_keeps_its_logprob_and_counts_in_the_tail():
    ids, logprobs = rows([(7, 0.1), (3, 0.5), (4, 0.3)], [(4, 0.2), (3, 0.6), (4, 0.2)])
    scores = scores_of("it", np.array([7, 4], np.int32), ids, logprobs, 0.0, V)
    np.testing.assert_allclose(np.exp(scores.logprobs), [0.1, 0.2], rtol=1e-6)
    assert scores.topk_ids.tolist() == [3, 4, 3, 4]
    np.testing.assert_allclose(np.exp(scores.tail_logprobs), [0.2, 0.2], rtol=1e-5)


def test_unsorted_entries_are_sorted_and_unlikely_ones_move_to_the_tail():
    ids, logprobs = rows([(4, 0.3), (4, 0.3), (3, 0.5), (5, 0.1)])
    scores = scores_of("it", np.array([4], np.int32), ids, logprobs, 0.2, V)
    assert scores.topk_ids.tolist() == [3, 4]
    assert scores.topk_counts.tolist() == [2]
    assert math.exp(scores.tail_logprobs[0]) == pytest.approx(0.2, rel=1e-5)


def tail(probabilities, outside=0.0, vocabulary=V):
    topk = np.log(np.array([probabilities], dtype=np.float64)).astype(np.float32).reshape(1, -1)
    seen = np.array([math.log(outside) if outside else -np.inf], dtype=np.float32)
    kept = np.ones(topk.shape, dtype=bool)
    return math.exp(derived_tail(topk, kept, seen, vocabulary)[0])


def test_the_whole_vocabulary_leaves_exactly_nothing():
    assert tail([0.5, 0.3, 0.2], vocabulary=3) == 0


def test_nothing_kept_leaves_everything():
    assert tail([]) == 1


def test_a_tail_lost_to_rounding_stands_at_what_rounding_hides():
    assert tail([1 - 1e-9, 1e-3]) == pytest.approx(TAIL_ROUNDING)


def test_a_tail_lost_to_rounding_is_no_more_than_the_tokens_outside_can_hold():
    assert tail([1 - 1e-9, 1e-10]) == pytest.approx(8 * 1e-10, rel=1e-5)


def test_a_token_seen_outside_is_part_of_the_tail():
    assert tail([0.999999, 3e-5], outside=2e-5) == pytest.approx(2e-5, rel=1e-5)


def test_another_token_than_the_responses_is_an_error_that_names_the_sequence():
    ids, logprobs = rows([(7, 0.1), (3, 0.5)])
    with pytest.raises(EngineError, match=r"sequence 4: .* position 0 is of token 7, the response has 6"):
        scores_of("sequence 4", np.array([6], np.int32), ids, logprobs, 0.0, V)


def test_an_id_of_a_padded_vocabulary_is_an_error():
    ids, logprobs = rows([(7, 0.1), (V, 0.5)])
    with pytest.raises(EngineError, match=f"names token {V}"):
        scores_of("it", np.array([7], np.int32), ids, logprobs, 0.0, V)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.5])
def test_a_logprob_that_is_none_is_an_error(bad):
    ids, logprobs = rows([(7, 0.1), (3, 0.5)])
    logprobs[0, 1] = bad
    with pytest.raises(EngineError, match="NaN or infinite"):
        scores_of("it", np.array([7], np.int32), ids, logprobs, 0.0, V)


def test_a_sample_that_ends_by_itself_or_at_its_limit_is_whole():
    assert sample_of("it", [3, 2], [-1, -2], "stop", 9, [2], V).finish_reason == "stop"
    assert sample_of("it", [3, 4], [-1, -2], "length", 2, [2], V).finish_reason == "length"
    assert sample_of("it", [3, 2], [-1, -2], "length", 2, [2], V).finish_reason == "stop"


@pytest.mark.parametrize(
    ("ids", "logprobs", "reason"),
    [
        ([3, 4], [-1, -2], "stop"),
        ([3], [-1], "length"),
        ([3], [-1], "abort"),
        ([3, 2], [-1], "stop"),
        ([], [], "stop"),
    ],
)
def test_a_sample_that_is_cut_or_lacks_logprobs_is_an_error(ids, logprobs, reason):
    with pytest.raises(EngineError, match="rollout p/0"):
        sample_of("rollout p/0", ids, logprobs, reason, 2, [2], V)


@pytest.fixture
def loop():
    made = LoopThread()
    yield made
    made.close()


def test_requests_run_together_within_the_budget_and_come_back_in_order(loop):
    sizes, running, seen = [3, 1, 9, 2, 4], set(), []

    async def ask(index):
        running.add(index)
        seen.append(sum(sizes[i] for i in running))
        await asyncio.sleep(0.01)
        running.discard(index)
        return index * 10

    assert loop.run(run_all(ask, sizes, budget=7)) == [0, 10, 20, 30, 40]
    assert seen[0] == 9  # larger than the budget: alone
    assert 7 >= max(seen[1:]) > 4


def test_no_more_requests_run_than_allowed(loop):
    running, most = set(), []

    async def ask(index):
        running.add(index)
        most.append(len(running))
        await asyncio.sleep(0.005)
        running.discard(index)

    loop.run(run_all(ask, [1] * 10, budget=100, most=3))
    assert max(most) == 3


def test_the_first_error_cancels_the_others(loop):
    cancelled = []

    async def ask(index):
        if index == 0:
            raise ValueError("the first")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(index)
            raise

    with pytest.raises(ValueError, match="the first"):
        loop.run(run_all(ask, [1, 1, 1], budget=10))
    assert sorted(cancelled) == [1, 2]
