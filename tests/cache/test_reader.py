"""What the trainer reads is what was written, and damage is named."""

import hashlib
import json
import shutil
from dataclasses import dataclass, field, fields, replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import make_cache, make_scores, write_rollouts, write_signal

from lightopd.cache.reader import TokenColumns, read_columns, read_shard_columns
from lightopd.cache.shards import WRITE_OPTIONS, shard_path
from lightopd.cache.store import open_cache
from lightopd.errors import CacheError
from lightopd.schemas.cache import ROLLOUTS, TOKEN_COLUMNS, list_of, schema_of
from lightopd.schemas.records import Floats

SIGNALS = {
    "teacher": {},
    "exact": {"topk_dtype": "float32", "top_k": 48},
    "adaptive": {"min_probability": 0.1, "top_k": 9},
    "sampled": {"top_k": 0},
}


def test_flat_columns_are_the_records_laid_end_to_end(tmp_path):
    cache, rollouts, _ = make_cache(tmp_path)
    for shard, rows in enumerate(rollouts):
        found = read_shard_columns(cache, shard)
        assert found.rollout_ids == tuple(row.rollout_id for row in rows)
        assert found.prompt_ids_by_user == tuple(row.prompt_id for row in rows)
        assert found.origins == tuple(row.origin for row in rows)
        assert found.domains == tuple(row.domain for row in rows)
        assert found.offsets.tolist() == [0, *np.cumsum([len(row.response_ids) for row in rows])]
        assert found.prompt_offsets.tolist() == [0, *np.cumsum([len(row.prompt_ids) for row in rows])]
        pairs = {
            "prompt_ids": found.prompt_ids_P,
            "response_ids": found.response_ids_N,
            "loss_mask": found.loss_mask_N,
            "turns": found.turns_N,
            "logprobs": found.logprobs_N,
            "entropies": found.entropies_N,
        }
        for name, values in pairs.items():
            wanted = np.concatenate([getattr(row, name) for row in rows])
            assert values.dtype == wanted.dtype
            np.testing.assert_array_equal(values, wanted)
        assert found.signals == {}


@pytest.mark.parametrize("name", SIGNALS)
def test_each_signals_columns_are_its_scores_laid_end_to_end(name, tmp_path):
    cache, _, scores = make_cache(tmp_path, signals=SIGNALS)
    dtype = cache.signals[name].manifest.topk_dtype
    for shard, rows in enumerate(scores[name]):
        found = read_shard_columns(cache, shard, [name]).signals[name]
        assert found.topk_logprobs_C.dtype == np.float32
        assert found.topk_offsets.dtype == np.int64
        np.testing.assert_array_equal(found.logprobs_N, np.concatenate([row.logprobs for row in rows]))
        np.testing.assert_array_equal(
            found.tail_logprobs_N, np.concatenate([row.tail_logprobs for row in rows])
        )
        np.testing.assert_array_equal(found.topk_ids_C, np.concatenate([row.topk_ids for row in rows]))
        wanted = np.concatenate([row.topk_logprobs for row in rows]).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found.topk_logprobs_C, wanted)
        np.testing.assert_array_equal(
            np.diff(found.topk_offsets), np.concatenate([row.topk_counts for row in rows])
        )


def test_the_topk_is_read_only_for_the_signals_that_want_it(tmp_path):
    cache, _, _ = make_cache(tmp_path, signals=SIGNALS)
    found = read_shard_columns(cache, 0, ["teacher", "exact"], topk=["exact"])
    assert found.signals["teacher"].topk_ids_C is None
    assert found.signals["teacher"].tail_logprobs_N is None
    assert len(found.signals["teacher"].logprobs_N) == 15
    assert len(found.signals["exact"].topk_ids_C) == 15 * 48


def test_values_that_were_not_measured_are_none_and_a_missing_reward_is_nan(tmp_path):
    _, rollouts, _ = make_cache(tmp_path / "a", signals={})
    bare = [replace(row, logprobs=None, entropies=None, reward=None, domain=None) for row in rollouts[0]]
    found = read_shard_columns(write_rollouts(tmp_path / "b", [bare]), 0)
    assert found.logprobs_N is None
    assert found.entropies_N is None
    assert np.isnan(found.rewards_R).all()
    assert found.rewards_R.dtype == np.float32
    assert found.domains == (None,) * 3


def test_a_shard_of_no_rows_and_a_response_of_no_tokens_are_read(tmp_path):
    cache, _, _ = make_cache(tmp_path / "a", lengths=[(0, 3, 0), ()])
    first = read_shard_columns(cache, 0, ["teacher"])
    assert first.offsets.tolist() == [0, 0, 3, 3]
    assert first.signals["teacher"].topk_offsets.tolist() == [0, 4, 8, 12]
    second = read_shard_columns(cache, 1, ["teacher"])
    assert second.offsets.tolist() == [0]
    assert second.signals["teacher"].topk_offsets.tolist() == [0]


def seal(path):
    """Give a file that was changed a marker that speaks of it; the cache, opened again."""
    marker = path.with_suffix(".json")
    told = json.loads(marker.read_text()) | {
        "size_bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    marker.write_text(json.dumps(told))
    return open_cache(path.parents[1])


def test_a_flipped_byte_in_any_page_of_a_column_is_found_while_reading(tmp_path):
    cache, _, _ = make_cache(tmp_path)
    path = shard_path(tmp_path / "signals" / "teacher", 0)
    content = path.read_bytes()
    group = pq.read_metadata(path).row_group(0)
    for column in range(group.num_columns):
        chunk = group.column(column)
        place = chunk.data_page_offset + chunk.total_compressed_size - 2
        if chunk.has_dictionary_page:
            place = chunk.dictionary_page_offset + chunk.total_compressed_size - 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CacheError, match=r"part-00000.parquet has SHA-256 .*, its marker says"):
            read_shard_columns(cache, 0, ["teacher"])


def test_a_missing_file_and_a_file_that_is_no_parquet_are_named(tmp_path):
    cache, _, _ = make_cache(tmp_path)
    path = shard_path(tmp_path / "rollouts", 1)
    path.write_bytes(b"nothing")
    sealed = seal(path)
    with pytest.raises(CacheError, match=r"part-00001.parquet cannot be read"):
        read_shard_columns(sealed, 1)
    path.unlink()
    with pytest.raises(CacheError, match=r"part-00001.parquet cannot be read"):
        read_shard_columns(cache, 1)


def test_a_file_with_other_columns_is_named_with_the_column(tmp_path):
    make_cache(tmp_path)
    path = shard_path(tmp_path / "rollouts", 0)
    table = pq.read_table(path)
    turns = table.column("turns")
    as_text = pa.array([str(row) for row in turns.to_pylist()])
    for changed, what in (
        (table.drop_columns(["turns"]), "turns is missing"),
        (table.set_column(8, "turns", as_text), r"turns is string, not list"),
        (table.append_column("more", turns), "than a cache has: more"),
        (table.select(table.column_names[::-1]), "the order differs"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(CacheError, match=what):
            read_shard_columns(seal(path), 0)


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        ({"lightopd.kind": "signals/teacher"}, "kind is 'signals/teacher', not 'rollouts'"),
        ({"lightopd.fingerprint": "f"}, "fingerprint is 'f', not "),
        ({"lightopd.schema_version": "9"}, "schema_version is '9', not '3'"),
    ],
)
def test_a_file_that_belongs_elsewhere_is_refused(tmp_path, metadata, what):
    make_cache(tmp_path)
    path = shard_path(tmp_path / "rollouts", 0)
    table = pq.read_table(path)
    told = {key.encode(): value for key, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **told}), path)
    with pytest.raises(CacheError, match=what):
        read_shard_columns(seal(path), 0)


@dataclass(frozen=True)
class Later:
    """A record that got a column in version 2."""

    name: str
    count: int
    behaviour: Floats | None = field(default=None, metadata={"since": 2})


def test_a_column_added_later_stands_last_and_is_null_in_older_files(tmp_path, monkeypatch):
    assert schema_of(Later, 1).names == ["name", "count"]
    assert schema_of(Later).field("behaviour") == pa.field("behaviour", list_of(pa.float32()))
    cache, *_ = make_cache(tmp_path)
    longer = ROLLOUTS.append(pa.field("behaviour", list_of(pa.float32())))
    monkeypatch.setattr("lightopd.cache.shards.ROLLOUTS", longer)
    found = read_columns(cache, 0, ["behaviour", "reward"])
    assert found.column_names == ["behaviour", "reward"]
    assert found.column("behaviour").null_count == 3


def test_the_trainers_columns_are_those_of_the_rollouts():
    assert tuple(one.name for one in fields(TokenColumns)) == tuple(f"{name}_N" for name in TOKEN_COLUMNS)


def test_a_signal_whose_rows_are_in_another_order_is_refused_with_the_row(tmp_path):
    cache, rollouts, scores = make_cache(tmp_path / "a")
    bare = write_rollouts(tmp_path / "b", rollouts)
    order = [0, 2, 1]
    rows = [[(rollouts[0][i].rollout_id, scores["teacher"][0][i]) for i in order]]
    rows += [[(row.rollout_id, score) for row, score in zip(rollouts[1], scores["teacher"][1], strict=True)]]
    cache = write_signal(bare, "teacher", rows)
    with pytest.raises(CacheError, match=r"teacher/part-00000.parquet row 1: speaks of rollout"):
        read_shard_columns(cache, 0, ["teacher"])


def test_a_signal_with_a_row_of_another_length_is_refused_with_the_row(tmp_path):
    _, rollouts, _ = make_cache(tmp_path / "a")
    rng = np.random.default_rng(0)
    bare = write_rollouts(tmp_path / "b", rollouts[:1])
    other = {5: 6, 1: 1, 9: 8}
    rows = [
        (row.rollout_id, make_scores(rng, np.zeros(other[len(row.response_ids)], np.int32), 4))
        for row in rollouts[0]
    ]
    cache = write_signal(bare, "teacher", [rows])
    with pytest.raises(CacheError, match=r"part-00000.parquet row 0: logprobs has 6 values, 5 are needed"):
        read_shard_columns(cache, 0, ["teacher"])


def test_a_moved_cache_is_read(tmp_path):
    make_cache(tmp_path / "a")
    before = read_shard_columns(open_cache(tmp_path / "a"), 1, ["teacher"])
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = read_shard_columns(open_cache(tmp_path / "b"), 1, ["teacher"])
    np.testing.assert_array_equal(after.signals["teacher"].topk_ids_C, before.signals["teacher"].topk_ids_C)


def test_polars_reads_the_files_alone(tmp_path):
    _, rollouts, scores = make_cache(tmp_path, signals=SIGNALS)
    frame = pl.read_parquet(tmp_path / "rollouts" / "part-*.parquet")
    assert frame.height == 5
    tokens = frame.explode("response_ids", "logprobs")
    wanted = np.concatenate([row.logprobs for shard in rollouts for row in shard])
    np.testing.assert_array_equal(tokens["logprobs"].to_numpy(), wanted)
    for name in SIGNALS:
        signal = pl.read_parquet(tmp_path / "signals" / name / "part-*.parquet")
        found = signal["topk_logprobs"].cast(pl.List(pl.Float32)).explode().drop_nulls().to_numpy()
        wanted = np.concatenate([row.topk_logprobs for shard in scores[name] for row in shard])
        np.testing.assert_allclose(found, wanted, rtol=2**-11)


def test_every_page_carries_a_checksum():
    assert WRITE_OPTIONS["write_page_checksum"] is True
