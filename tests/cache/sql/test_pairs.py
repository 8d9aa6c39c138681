"""Rollouts beside what signals say of them: which rows stand together, and that no join holds one side."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_cases import make_cache

from lightopd.cache.index import query
from lightopd.cache.manifests import signal_folder
from lightopd.cache.shards import marker_path, shard_path, write_shard
from lightopd.cache.sql.views import PIECES
from lightopd.errors import CacheError

TWO = {"teacher": {}, "wide": {"role": "reference", "top_k": 48, "topk_dtype": "float32"}}
MANY = tuple((2, 1 + index % 5) for index in range(2 * PIECES + 3))
"""Lengths of more shards than are read at the same time."""


def test_tokens_of_many_shards_stand_beside_those_signals_that_have_them(tmp_path):
    _, rollouts, scores = make_cache(tmp_path, signals=TWO, lengths=MANY)
    left_out = {"teacher": {0, 7, 18}, "wide": {3, 7}}
    for name, shards in left_out.items():
        for index in shards:
            marker_path(signal_folder(tmp_path, name), index).unlink()
    wanted = {(None, row.rollout_id): np.full(len(row.response_ids), np.nan) for row in rollouts[7]}
    for name, missing in left_out.items():
        for index in {*range(len(MANY))} - missing:
            for row, score in zip(rollouts[index], scores[name][index], strict=True):
                wanted[name, row.rollout_id] = row.logprobs - score.logprobs
    rows = query(tmp_path, "SELECT signal, rollout_id, pos, gap FROM tokens ORDER BY pos").to_pylist()
    found = {}
    for row in rows:
        found.setdefault((row["signal"], row["rollout_id"]), []).append(row["gap"])
    assert found.keys() == wanted.keys()
    for key, gaps in wanted.items():
        np.testing.assert_array_equal(np.array(found[key], dtype=float), gaps)


def test_filters_on_either_side_keep_the_rows_together(tmp_path):
    _, rollouts, scores = make_cache(tmp_path, lengths=MANY)
    condition = "domain = 'sums' AND response_tokens > 2 AND logprob_signal < -1 AND row_in_shard = 1"
    sql = f"SELECT rollout_id, gap FROM tokens JOIN rollouts USING (rollout_id) WHERE {condition}"
    sql = sql.replace("domain", "tokens.domain").replace("response_tokens", "tokens.response_tokens")
    found = Counter((row["rollout_id"], row["gap"]) for row in query(tmp_path, sql).to_pylist())
    wanted = Counter(
        (shard[1].rollout_id, float(gap))
        for shard, own in zip(rollouts, scores["teacher"], strict=True)
        if shard[1].domain == "sums" and len(shard[1].response_ids) > 2
        for gap in (shard[1].logprobs - own[1].logprobs)[own[1].logprobs < -1]
    )
    assert found == wanted
    assert wanted


def test_rows_that_are_not_of_the_rollouts_beside_them_are_a_cache_error(tmp_path):
    cache = make_cache(tmp_path, lengths=MANY)[0]
    folder, fingerprint = signal_folder(tmp_path, "teacher"), cache.signals["teacher"].manifest.fingerprint()
    table = pq.read_table(shard_path(folder, 5)).take([1, 0])
    write_shard(folder, 5, table, kind="signals/teacher", fingerprint=fingerprint)
    with pytest.raises(CacheError, match=r"part-00005.parquet has other rows than its rollouts.*verify"):
        query(tmp_path, "SELECT avg(gap) FROM tokens")


def test_tokens_are_read_without_a_join_that_holds_lists(tmp_path):
    make_cache(tmp_path, signals=TWO)
    plan = query(tmp_path, "EXPLAIN SELECT signal, avg(gap) FROM tokens GROUP BY signal")
    text = "".join(plan.column("explain_value").to_pylist()).lower()
    assert "positional scan" in text
    assert "join" not in text
