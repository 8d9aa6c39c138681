"""From shards to tensors: every number must arrive where it belongs."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_cases import table_to_rollouts, table_to_scores
from training_runs import read_first

from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.reader import read_shard_columns
from lightopd.cache.shards import shard_path
from lightopd.errors import CacheError
from lightopd.objectives.base.batch import BatchTotals
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.data.batches import CacheData, StepDataset, collate, collect_rows
from lightopd.training.data.plan import make_plan
from lightopd.training.data.shard_store import FirstReading, index_cache

CPU = torch.device("cpu")
TOTALS = BatchTotals(3, 30)


def open_store(cache, topk=("teacher",), limit_bytes=2**30):
    """With nothing in memory yet."""
    store, index = read_first(cache, topk, limit_bytes=0)
    return replace(store, limit_bytes=limit_bytes), index


def records_of(cache):
    """Every rollout and its scores, read by another path than the trainer's."""
    import pyarrow.parquet as pq

    rollouts, scores = [], []
    for shard in cache.shards:
        rollouts += table_to_rollouts(pq.read_table(shard_path(rollouts_folder(cache.path), shard)))
        scores += table_to_scores(pq.read_table(shard_path(signal_folder(cache.path, "teacher"), shard)))
    return rollouts, scores


def test_a_micro_batch_holds_the_records_row_by_row(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache"))
    entries = np.array([17, 2, 9])
    batch = collate(collect_rows(store, index, entries, TOTALS), CPU)
    records, scores = records_of(store.cache)
    side = batch.rollouts
    start = 0
    for row, entry in enumerate(entries):
        record, scored = records[entry], scores[entry]
        ids = np.concatenate([record.prompt_ids, record.response_ids])
        assert batch.input_ids_BT[row, : len(ids)].tolist() == ids.tolist()
        assert not batch.input_ids_BT[row, len(ids) :].any()
        tokens = slice(start, start + len(record.response_ids))
        start = tokens.stop
        assert side.ids_N[tokens].tolist() == record.response_ids.tolist()
        assert side.row_N[tokens].tolist() == [row] * len(record.response_ids)
        assert side.index_N[tokens].tolist() == list(range(len(record.response_ids)))
        assert side.loss_mask_N[tokens].tolist() == record.loss_mask.tolist()
        assert side.turns_N[tokens].tolist() == record.turns.tolist()
        assert side.ref_logprobs_N[tokens].tolist() == record.logprobs.tolist()
        assert side.lengths_R[row] == record.loss_mask.sum()
        assert side.is_truncated_R[row] == record.truncated
        assert side.domains[row] == record.domain
        assert side.rollout_ids[row] == record.rollout_id
        reward = float(side.rewards_R[row])
        assert (np.isnan(reward) and record.reward is None) or reward == record.reward
        signal = side.signals["teacher"]
        assert signal.logprobs_N[tokens].tolist() == scored.logprobs.tolist()
        assert signal.tail_logprobs_N[tokens].tolist() == scored.tail_logprobs.tolist()
        is_entry = signal.topk_ids_NK[tokens] >= 0
        assert is_entry.sum(1).tolist() == scored.topk_counts.tolist()
        assert signal.topk_ids_NK[tokens][is_entry].tolist() == scored.topk_ids.tolist()
        assert signal.topk_logprobs_NK[tokens][is_entry].tolist() == scored.topk_logprobs.tolist()
        assert (signal.topk_logprobs_NK[tokens][~is_entry] == -torch.inf).all()
    assert start == len(side.ids_N)
    assert side.totals == TOTALS
    assert batch.num_tokens == sum(len(records[e].prompt_ids) + len(records[e].response_ids) for e in entries)


def test_each_response_token_is_predicted_by_the_position_before_it(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache"))
    batch = collate(collect_rows(store, index, np.array([3, 21, 8]), TOTALS), CPU)
    assert batch.input_ids_BT.flatten()[batch.positions_N + 1].tolist() == batch.rollouts.ids_N.tolist()
    first = batch.rollouts.index_N == 0
    rows = batch.positions_N[first] // batch.input_ids_BT.shape[1]
    assert rows.tolist() == [0, 1, 2]


def test_rollouts_of_one_prompt_share_a_group_and_others_do_not(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache"))
    groups = collect_rows(store, index, np.array([4, 5, 6]), TOTALS).groups_R
    assert groups[0] == groups[1] != groups[2]


def test_a_signal_without_its_top_k_has_an_empty_support_and_all_mass_outside(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache"), topk=())
    signal = collate(collect_rows(store, index, np.array([0, 1]), TOTALS), CPU).rollouts.signals["teacher"]
    assert signal.topk_ids_NK.shape == (len(signal.logprobs_N), 0)
    assert not signal.tail_logprobs_N.any()


def test_log_probabilities_of_another_author_are_no_reference_for_drift(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache", origin="teacher"))
    batch = collate(collect_rows(store, index, np.array([0, 1]), TOTALS), CPU)
    assert batch.rollouts.ref_logprobs_N is None


def test_rollouts_without_a_trained_token_are_left_out_and_counted(make_cache, tmp_path):
    def mask_third(rollout):
        is_third = rollout.prompt_id == "prompt-3"
        return replace(rollout, loss_mask=rollout.loss_mask & (not is_third))

    index = index_cache(make_cache(tmp_path / "cache", change=mask_third), ("teacher",), ())
    assert len(index.row_P) == 20
    assert index.num_left_out == 2
    assert not set(zip(index.shard_P, index.row_P, strict=True)) & {(0, 6), (0, 7)}


def test_an_empty_prompt_is_refused_with_its_row(make_cache, tmp_path):
    def empty_tenth(rollout):
        is_tenth = (rollout.prompt_id, rollout.sample_index) == ("prompt-5", 0)
        return replace(rollout, prompt_ids=rollout.prompt_ids[:0]) if is_tenth else rollout

    cache = make_cache(tmp_path / "cache", change=empty_tenth)
    with pytest.raises(CacheError, match=r"part-00001.parquet row 2: its prompt is empty"):
        index_cache(cache, ("teacher",), ())


def test_a_shard_with_one_byte_flipped_is_refused_before_the_first_step(make_cache, tmp_path):
    cache = make_cache(tmp_path / "cache")
    path = shard_path(signal_folder(cache.path, "teacher"), 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"signals/teacher/part-00001.parquet has SHA-256"):
        list(FirstReading(cache, ("teacher",), (), 2**30))


def test_what_is_decoded_first_are_the_bytes_whose_sha_256_was_compared(make_cache, tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache")
    wanted = [read_shard_columns(cache, shard, ("teacher",)) for shard in cache.shards]

    def damaged_after_the_check(cache, shard, *rest, **named):
        for folder in (rollouts_folder(cache.path), signal_folder(cache.path, "teacher")):
            path = shard_path(folder, shard)
            path.write_bytes(b"?" * path.stat().st_size)
        return read_shard_columns(cache, shard, *rest, **named)

    monkeypatch.setattr("lightopd.training.data.shard_store.read_shard_columns", damaged_after_the_check)
    found = list(FirstReading(cache, ("teacher",), ("teacher",), 2**30))
    for own, other in zip(found, wanted, strict=True):
        assert own.rollout_ids == other.rollout_ids
        assert np.array_equal(own.response_ids_N, other.response_ids_N)
        assert np.array_equal(own.signals["teacher"].topk_ids_C, other.signals["teacher"].topk_ids_C)


def test_a_shard_that_is_gone_before_the_first_reading_is_named(make_cache, tmp_path):
    cache = make_cache(tmp_path / "cache")
    shard_path(rollouts_folder(cache.path), 1).unlink()
    with pytest.raises(CacheError, match=r"rollouts/part-00001.parquet cannot be read \(.*No such file"):
        list(FirstReading(cache, ("teacher",), (), 2**30))


def test_a_shard_that_changes_during_training_is_noticed(make_cache, tmp_path):
    store, _ = open_store(make_cache(tmp_path / "cache"))
    path = shard_path(rollouts_folder(store.cache.path), 2)
    path.write_bytes(path.read_bytes())
    with pytest.raises(CacheError, match=r"part-00002.parquet has changed or is gone since training began"):
        store.shard(2)


def test_shards_in_memory_stay_within_the_limit(make_cache, tmp_path):
    cache = make_cache(tmp_path / "cache", num_rollouts=32, per_shard=4)
    _, index = open_store(cache)
    store, _ = open_store(cache, limit_bytes=int(2.5 * index.bytes_S.max()))
    for number in (0, 1, 0, 2, 3, 0):
        store.shard(number)
        assert store._held_bytes() <= store.limit_bytes
    assert set(store._held) <= {2, 3, 0}
    assert store.shard(0) is store.shard(0)


@pytest.mark.parametrize(("spare_bytes", "num_held"), [(0, 3), (-1, 0)])
def test_a_cache_stays_in_memory_after_its_first_reading_only_as_a_whole(
    make_cache, tmp_path, spare_bytes, num_held
):
    cache = make_cache(tmp_path / "cache")
    plain, index = open_store(cache)
    reading = FirstReading(cache, plain.signals, plain.topk, int(index.bytes_S.sum()) + spare_bytes)
    columns = list(reading)
    store = reading.store(index_cache(cache, plain.signals, plain.topk, parts=reading.parts))
    assert [store.shard(number) is columns[number] for number in range(3)] == [num_held == 3] * 3
    assert np.array_equal(store.bytes_S, index.bytes_S)


def test_the_first_reading_gives_the_index_of_a_reading_for_it_alone(make_cache, tmp_path):
    cache = make_cache(tmp_path / "cache")
    _, found = open_store(cache)
    index = index_cache(cache, ("teacher",), ("teacher",))
    for name in ("shard_P", "row_P", "prompts_P", "responses_P", "trained_P", "groups_P"):
        assert np.array_equal(getattr(found, name), getattr(index, name))


def test_a_store_that_is_sent_to_another_process_leaves_its_shards_behind(make_cache, tmp_path):
    store, _ = open_store(make_cache(tmp_path / "cache"))
    store.shard(0)
    sent = pickle.loads(pickle.dumps(store))
    assert not sent._held
    assert sent.shard(0).rollout_ids == store.shard(0).rollout_ids


def test_the_size_a_shard_counts_with_is_no_less_than_its_columns(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache"))
    columns = store.shard(0)
    arrays = [columns.prompt_ids_P, columns.response_ids_N, columns.loss_mask_N, columns.turns_N]
    arrays += [columns.logprobs_N, columns.entropies_N, columns.offsets, columns.prompt_offsets]
    signal = columns.signals["teacher"]
    arrays += [signal.logprobs_N, signal.tail_logprobs_N, signal.topk_offsets, signal.topk_ids_C]
    arrays += [signal.topk_logprobs_C]
    assert sum(array.nbytes for array in arrays) <= index.bytes_S[0]


def as_plain(item):
    return [(rows.rollout_ids, rows.response_ids_N.tolist(), rows.totals) for rows in item]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_at_the_resume_step_whatever_the_number_of_workers(make_cache, tmp_path, workers):
    store, index = open_store(make_cache(tmp_path / "cache"))
    finetune = FinetuneConfig(steps=6, batch_sequences=4, micro_batch_tokens=40, loader_workers=workers)
    data = CacheData(store, index, finetune, step=2)
    data.trainer = Ranks()
    items = [as_plain(item) for item in data.train_dataloader()]
    dataset = StepDataset(make_plan(index, finetune, 0, 1), store)
    assert items == [as_plain(dataset[step]) for step in (2, 3, 4, 5)]


class Ranks:
    """What the loader asks Lightning's trainer."""

    global_rank = 0
    world_size = 1


def test_an_unreadable_shard_comes_out_of_a_worker_as_its_own_error(make_cache, tmp_path):
    store, index = open_store(make_cache(tmp_path / "cache"))
    shard_path(rollouts_folder(store.cache.path), 0).unlink()
    finetune = FinetuneConfig(steps=1, batch_sequences=22, micro_batch_tokens=40, loader_workers=1)
    data = CacheData(store, index, finetune, step=0)
    data.trainer = Ranks()
    (item,) = data.train_dataloader()
    assert isinstance(item, CacheError)
