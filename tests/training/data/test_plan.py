"""Order of rollouts, their division into micro-batches, and what must not change them."""

import numpy as np
import pytest

from lightopd.errors import ConfigError, TrainingError
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.data.plan import CacheIndex, epoch_order, make_plan, pack

ROOMY = 2**40


def make_index(num_rollouts=10, per_shard=4, bytes_per_shard=100, longest=9):
    places = np.arange(num_rollouts, dtype=np.int32)
    responses = (places * 7 % longest + 1).astype(np.int32)
    return CacheIndex(
        shard_P=places // per_shard,
        row_P=places % per_shard,
        prompts_P=np.full(num_rollouts, 3, dtype=np.int32),
        responses_P=responses,
        trained_P=responses,
        groups_P=places.astype(np.int64) // 2,
        bytes_S=np.full(-(-num_rollouts // per_shard), bytes_per_shard, dtype=np.int64),
    )


def make(index=None, rank=0, world_size=1, **settings):
    defaults = {"batch_sequences": 4, "micro_batch_tokens": 24, "steps": 10}
    return make_plan(index or make_index(), FinetuneConfig(**(defaults | settings)), rank, world_size)


def steps_of(plan, steps):
    return [plan.rollouts(step).tolist() for step in range(steps)]


def test_an_epoch_holds_every_rollout_once_and_the_next_goes_on_without_a_gap():
    stream = [entry for batch in steps_of(make(), 5) for entry in batch]
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]


def test_every_batch_is_full_even_when_the_cache_is_smaller():
    plan = make(make_index(num_rollouts=3), batch_sequences=8)
    assert all(len(batch) == 8 and set(batch) == {0, 1, 2} for batch in steps_of(plan, 4))


def test_the_order_depends_on_seed_and_epoch_only():
    assert steps_of(make(seed=1), 6) == steps_of(make(seed=1, micro_batch_tokens=999), 6)
    assert steps_of(make(seed=1), 6) == steps_of(make(seed=1, world_size=2, rank=1), 6)
    assert steps_of(make(seed=1), 6) != steps_of(make(seed=2), 6)


def test_the_order_is_pinned_so_that_a_resumed_run_goes_on_with_the_same_batches():
    assert epoch_order(make_index(), 0, 0, ROOMY).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_a_step_asked_for_out_of_turn_is_the_same_step():
    in_turn = steps_of(make(), 9)
    assert make().rollouts(8).tolist() == in_turn[8]


def test_a_cache_that_fits_is_shuffled_as_a_whole():
    first = make_index(num_rollouts=400, per_shard=100).shard_P[
        epoch_order(make_index(num_rollouts=400, per_shard=100), 0, 0, ROOMY)
    ][:100]
    assert set(first) == {0, 1, 2, 3}


def test_a_large_cache_is_shuffled_in_windows_so_that_a_shard_is_read_once():
    index = make_index(num_rollouts=80, per_shard=10, bytes_per_shard=100)
    order = epoch_order(index, 0, 0, window_bytes=200)
    assert sorted(order.tolist()) == list(range(80))
    windows = [set(index.shard_P[order[start : start + 20]]) for start in range(0, 80, 20)]
    assert [len(window) for window in windows] == [2, 2, 2, 2]
    assert set.union(*windows) == set(range(8))
    assert index.shard_P[order[:20]].tolist() != sorted(index.shard_P[order[:20]].tolist())


def test_a_shard_larger_than_the_window_is_a_window_of_its_own():
    index = make_index(num_rollouts=8, per_shard=4, bytes_per_shard=100)
    order = epoch_order(index, 0, 0, window_bytes=1)
    assert len(set(index.shard_P[order[:4]])) == 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", [12, 30, 10_000])
def test_micro_batches_cover_the_batch_within_the_budget_and_are_equally_many(world_size, budget):
    lengths = np.random.default_rng(0).integers(1, 13, size=16).astype(np.int32)
    dealt = pack(lengths, budget, world_size)
    micro_batches = [places for rank in dealt for places in rank]
    assert sorted(np.concatenate(micro_batches).tolist()) == list(range(16))
    assert len({len(rank) for rank in dealt}) == 1
    for places in micro_batches:
        assert len(places) * lengths[places].max() <= budget


def test_work_is_dealt_evenly():
    lengths = np.random.default_rng(0).integers(20, 400, size=256).astype(np.int32)
    loads = [sum(len(p) * lengths[p].max() for p in rank) for rank in pack(lengths, 2000, 4)]
    assert max(loads) <= 1.1 * min(loads)


def test_rollouts_of_like_length_share_a_micro_batch():
    lengths = np.array([100, 1, 100, 1, 100, 1, 100, 1], dtype=np.int32)
    padded = sum(len(p) * lengths[p].max() for p in pack(lengths, 200, 1)[0])
    assert padded == lengths.sum()


def test_totals_are_those_of_the_whole_batch_on_every_rank():
    index = make_index()
    plans = [make(index, rank=rank, world_size=2) for rank in (0, 1)]
    totals = plans[0].totals(3)
    assert totals == plans[1].totals(3)
    assert totals.num_rollouts == 4
    assert totals.num_tokens == index.trained_P[plans[0].rollouts(3)].sum()
    shared = [entry for plan in plans for batch in plan.micro_batches(3) for entry in batch]
    assert sorted(shared) == sorted(plans[0].rollouts(3).tolist())


def test_a_rollout_that_does_not_fit_is_refused_with_the_numbers_to_change():
    with pytest.raises(TrainingError, match=r"row 1 of rollout shard 1 has 12 tokens .* to 12 or more"):
        make(make_index(num_rollouts=10, longest=9), micro_batch_tokens=11)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="multiple of 3"):
        make(world_size=3)


def test_a_cache_without_trained_tokens_is_refused():
    with pytest.raises(TrainingError, match="no rollout with a trained token"):
        make(make_index(num_rollouts=0))
