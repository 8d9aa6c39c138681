"""Records to tables and back, and the numbers that are refused."""

import hashlib
import struct
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import make_rollout, make_scores, table_to_rollouts, table_to_scores

from lightopd.cache.shards import shard_bytes
from lightopd.cache.tables import (
    rollout_id,
    rollouts_to_table,
    scores_to_table,
)
from lightopd.errors import EngineError
from lightopd.schemas.cache import ROLLOUTS, SIGNALS


def assert_same(found, wanted):
    for field in fields(wanted):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b, err_msg=field.name)
        else:
            assert a == b, field.name


def through_parquet(table: pa.Table, path: Path) -> pa.Table:
    path.write_bytes(shard_bytes(table, kind="test", fingerprint="f"))
    return pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("seed", range(20))
def test_random_ragged_records_come_back_from_parquet_as_they_were(seed, tmp_path):
    rng = np.random.default_rng(seed)
    top_k = int(rng.choice([0, 1, 5, 48]))
    smallest = float(rng.choice([0.0, 0.05, 0.9]))
    lengths = rng.integers(0, 40, int(rng.integers(0, 80)))
    has_logprobs = bool(rng.random() < 0.7)
    rollouts = [
        replace(
            make_rollout(rng, int(length)),
            logprobs=-rng.random(length).astype(np.float32) if has_logprobs else None,
            entropies=None,
            reward=float(np.float32(rng.normal())) if rng.random() < 0.5 else None,
            domain=None,
            prompt_text=None,
        )
        for length in lengths
    ]
    scores = [make_scores(rng, row.response_ids, top_k, smallest) for row in rollouts]

    table = through_parquet(rollouts_to_table(rollouts), tmp_path / "rollouts.parquet")
    for found, wanted in zip(table_to_rollouts(table), rollouts, strict=True):
        assert_same(found, wanted)

    names = [row.rollout_id for row in rollouts]
    table = through_parquet(scores_to_table(names, scores, "float32"), tmp_path / "scores.parquet")
    assert table.column("rollout_id").to_pylist() == names
    for found, wanted in zip(table_to_scores(table), scores, strict=True):
        assert_same(found, wanted)


def test_float16_topk_is_the_nearest_half_and_the_other_columns_keep_every_bit():
    rng = np.random.default_rng(0)
    scores = make_scores(rng, np.arange(9, dtype=np.int32), 7)
    found = table_to_scores(scores_to_table(["a"], [scores], "float16"))[0]
    np.testing.assert_array_equal(
        found.topk_logprobs, scores.topk_logprobs.astype(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(found.logprobs, scores.logprobs)
    np.testing.assert_array_equal(found.tail_logprobs, scores.tail_logprobs)
    np.testing.assert_array_equal(found.topk_ids, scores.topk_ids)


def test_an_empty_list_of_records_is_an_empty_table_of_the_right_schema():
    assert rollouts_to_table([]).schema.equals(ROLLOUTS)
    assert scores_to_table([], [], "float16").schema.equals(SIGNALS)


def test_ids_above_sixteen_bits_survive():
    big = np.array([0, 65_535, 65_536, 151_935, 262_143], dtype=np.int32)
    rng = np.random.default_rng(0)
    scores = replace(make_scores(rng, np.arange(5, dtype=np.int32), 1), topk_ids=big)
    np.testing.assert_array_equal(
        table_to_scores(scores_to_table(["a"], [scores], "float16"))[0].topk_ids, big
    )


def test_rollout_id_depends_on_each_of_its_parts_and_on_where_prompt_and_response_meet():
    a, b = np.array([1, 2], np.int32), np.array([3], np.int32)
    base = rollout_id(a, b, "sampler", 0)
    others = {
        rollout_id(np.array([1], np.int32), np.array([2, 3], np.int32), "sampler", 0),
        rollout_id(a, np.array([4], np.int32), "sampler", 0),
        rollout_id(a, b, "other", 0),
        rollout_id(a, b, "sampler", 1),
    }
    assert len(others | {base}) == 5
    assert rollout_id(a.astype(np.int64), b, "sampler", 0) == base


def test_rollout_id_is_the_hash_of_the_documented_bytes():
    content = b"lightopd.rollout.1\n" + struct.pack("<4q", 3, 9, 2, 1) + b"abc" + struct.pack("<3i", 5, 6, 1)
    found = rollout_id(np.array([5, 6], np.int32), np.array([1], np.int32), "abc", 9)
    assert found == hashlib.sha256(content).hexdigest()[:32]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["logprobs", "entropies"])
def test_a_rollout_with_a_broken_number_is_refused_by_name_and_position(column, value):
    rollout = make_rollout(np.random.default_rng(0), 6)
    broken = getattr(rollout, column).copy()
    broken[4] = value
    with pytest.raises(EngineError, match=rf"{rollout.rollout_id} has {column} = .* at position 4"):
        rollouts_to_table([rollout, replace(rollout, **{column: broken})])


def test_a_reward_that_is_not_finite_is_refused():
    rollout = replace(make_rollout(np.random.default_rng(0), 6), reward=float("nan"))
    with pytest.raises(EngineError, match="reward"):
        rollouts_to_table([rollout])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("column", ["logprobs", "topk_logprobs", "tail_logprobs"])
def test_a_score_with_a_broken_number_is_refused_by_name_and_position(column, value):
    scores = make_scores(np.random.default_rng(0), np.arange(6, dtype=np.int32), 4)
    broken = getattr(scores, column).copy()
    broken[4 * 4 + 1 if column == "topk_logprobs" else 4] = value
    with pytest.raises(EngineError, match=rf"row-b has {column}.* at position 4"):
        scores_to_table(["row-a", "row-b"], [scores, replace(scores, **{column: broken})], "float16")


def test_minus_infinity_is_refused_for_a_token_and_kept_for_a_tail():
    scores = make_scores(np.random.default_rng(0), np.arange(3, dtype=np.int32), 48)
    assert np.isneginf(scores.tail_logprobs).all()
    found = table_to_scores(scores_to_table(["a"], [scores], "float16"))[0]
    np.testing.assert_array_equal(found.tail_logprobs, scores.tail_logprobs)
    impossible = np.full(3, -np.inf, np.float32)
    with pytest.raises(EngineError, match="position 0"):
        scores_to_table(["a"], [replace(scores, logprobs=impossible)], "float16")


def test_a_logprob_that_float16_cannot_hold_is_refused_and_float32_takes_it():
    scores = make_scores(np.random.default_rng(0), np.arange(3, dtype=np.int32), 2)
    far = scores.topk_logprobs.copy()
    far[3] = -70_000
    scores = replace(scores, topk_logprobs=far)
    with pytest.raises(EngineError, match=r"float16.*-70000.* at position 1"):
        scores_to_table(["a"], [scores], "float16")
    assert table_to_scores(scores_to_table(["a"], [scores], "float32"))[0].topk_logprobs[3] == -70_000


@pytest.mark.parametrize("column", ["loss_mask", "turns", "logprobs", "entropies"])
def test_a_rollout_whose_columns_differ_in_length_is_refused(column):
    rollout = make_rollout(np.random.default_rng(0), 6)
    with pytest.raises(EngineError, match=f"6 response tokens but 5 {column}"):
        rollouts_to_table([replace(rollout, **{column: getattr(rollout, column)[:5]})])


@pytest.mark.parametrize("column", ["topk_counts", "tail_logprobs", "topk_ids", "topk_logprobs"])
def test_scores_whose_columns_differ_in_length_are_refused(column):
    scores = make_scores(np.random.default_rng(0), np.arange(6, dtype=np.int32), 4)
    with pytest.raises(EngineError, match="rollout a has"):
        scores_to_table(["a"], [replace(scores, **{column: getattr(scores, column)[:5]})], "float16")


def test_logprobs_for_only_some_rollouts_are_refused():
    rng = np.random.default_rng(0)
    rollouts = [make_rollout(rng, 3), replace(make_rollout(rng, 3), logprobs=None)]
    with pytest.raises(EngineError, match=rf"{rollouts[1].rollout_id} has no logprobs"):
        rollouts_to_table(rollouts)


def test_a_missing_score_is_refused():
    with pytest.raises(EngineError, match=r"2 rollouts .* 1 scores"):
        scores_to_table(
            ["a", "b"], [make_scores(np.random.default_rng(0), np.zeros(1, np.int32), 1)], "float16"
        )
