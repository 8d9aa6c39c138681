"""SQL over a cache: what the views hold, and that nothing outside the cache can be reached or changed."""

import hashlib
import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from cache_cases import make_cache

import lightopd
from lightopd.cache.index import VIEWS, build_index, query
from lightopd.cache.store import open_cache
from lightopd.errors import CacheError, ConfigError

TWO = {"teacher": {}, "wide": {"role": "reference", "top_k": 48, "topk_dtype": "float32"}}
KINDS = {
    "none": {},
    "one": {"teacher": {}},
    "several": TWO,
    "sampled only": {"teacher": {"top_k": 0}},
    "adaptive": {"teacher": {"min_probability": 0.1, "top_k": 9}},
}


def snapshot(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_works_for_every_kind_of_cache(kind, tmp_path):
    make_cache(tmp_path, signals=KINDS[kind])
    for view in VIEWS:
        assert query(tmp_path, f"SELECT * FROM {view}").num_columns > 0, view


def test_rollouts_has_one_row_for_each_rollout(tmp_path):
    _, rollouts, _ = make_cache(tmp_path)
    rows = query(tmp_path, "SELECT * FROM rollouts ORDER BY shard, row_in_shard").to_pylist()
    wanted = [row for shard in rollouts for row in shard]
    assert [row["rollout_id"] for row in rows] == [row.rollout_id for row in wanted]
    for found, row in zip(rows, wanted, strict=True):
        assert found["prompt_tokens"] == len(row.prompt_ids)
        assert found["response_tokens"] == len(row.response_ids)
        assert found["trained_tokens"] == row.loss_mask.sum()
        assert found["response_ids"] == row.response_ids.tolist()
        assert found["mean_logprob_student"] == pytest.approx(row.logprobs.mean(), rel=1e-6)
        assert found["reward"] == 0.5


def test_tokens_has_one_row_for_each_token_and_signal_with_the_exact_values(tmp_path):
    _, rollouts, scores = make_cache(tmp_path, signals=TWO)
    for name in TWO:
        found = query(tmp_path, f"SELECT * FROM tokens WHERE signal = '{name}'")
        found = {column: found.column(column).to_numpy() for column in found.column_names}
        rows = [row for shard in rollouts for row in shard]
        values = [score for shard in scores[name] for score in shard]
        wanted = {
            "rollout_id": np.repeat(
                [row.rollout_id for row in rows], [len(row.response_ids) for row in rows]
            ),
            "pos": np.concatenate([np.arange(len(row.response_ids)) for row in rows]),
            "token_id": np.concatenate([row.response_ids for row in rows]),
            "loss_mask": np.concatenate([row.loss_mask for row in rows]),
            "turn": np.concatenate([row.turns for row in rows]),
            "logprob_student": np.concatenate([row.logprobs for row in rows]),
            "entropy_student": np.concatenate([row.entropies for row in rows]),
            "logprob_signal": np.concatenate([score.logprobs for score in values]),
            "logprob_tail": np.concatenate([score.tail_logprobs for score in values]),
            "topk_count": np.concatenate([score.topk_counts for score in values]),
        }
        wanted["gap"] = wanted["logprob_student"] - wanted["logprob_signal"]
        order = np.lexsort((found["pos"], found["rollout_id"].astype(str)))
        order_wanted = np.lexsort((wanted["pos"], wanted["rollout_id"]))
        for column, content in wanted.items():
            np.testing.assert_array_equal(found[column][order], content[order_wanted], err_msg=column)


def test_the_distribution_that_sampled_has_columns_of_its_own(world):
    """Rollouts at temperature 1 from all tokens: it is the student's own."""
    found = query(world.cache, "SELECT logprob_behavior, logprob_student FROM tokens")
    np.testing.assert_array_equal(*(column.to_numpy() for column in found.columns))
    means = query(world.cache, "SELECT mean_logprob_behavior, mean_logprob_student FROM rollouts")
    np.testing.assert_allclose(*(column.to_numpy() for column in means.columns))


def test_tokens_of_a_cache_without_signals_have_no_signal_and_no_gap(tmp_path):
    make_cache(tmp_path, signals={})
    sql = "SELECT count(*) AS n, count(signal) AS s, count(gap) AS g FROM tokens"
    assert query(tmp_path, sql).to_pylist() == [{"n": 30, "s": 0, "g": 0}]
    assert query(tmp_path, "SELECT * FROM topk").num_rows == 0


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 48, "topk_dtype": "float32"}, {"min_probability": 0.1, "top_k": 9}]
)
def test_topk_has_one_row_for_each_entry_with_its_place_and_rank(settings, tmp_path):
    _, rollouts, scores = make_cache(tmp_path, signals={"teacher": settings})
    found = query(tmp_path, "SELECT * FROM topk ORDER BY rollout_id, pos, rank").to_pylist()
    wanted = [
        (row.rollout_id, pos, rank + 1, int(ids[rank]), float(values[rank]))
        for shard, own in zip(rollouts, scores["teacher"], strict=True)
        for row, score in zip(shard, own, strict=True)
        for pos, (ids, values) in enumerate(
            zip(
                np.split(score.topk_ids, np.cumsum(score.topk_counts)[:-1]),
                np.split(score.topk_logprobs, np.cumsum(score.topk_counts)[:-1]),
                strict=True,
            )
        )
        for rank in range(len(ids))
    ]
    assert len(found) == len(wanted)
    for row, (rollout, pos, rank, token, logprob) in zip(found, sorted(wanted), strict=True):
        assert (row["rollout_id"], row["pos"], row["rank"], row["token_id"]) == (rollout, pos, rank, token)
        assert row["logprob"] == pytest.approx(logprob, rel=2**-11)


def test_signals_has_one_row_for_each_signal(tmp_path):
    cache, _, _ = make_cache(tmp_path, signals=TWO)
    rows = query(tmp_path, "SELECT * FROM signals ORDER BY name").to_pylist()
    assert [row["name"] for row in rows] == ["teacher", "wide"]
    assert rows[1]["top_k"] == 48
    assert (rows[0]["rows"], rows[0]["tokens"], rows[0]["shards"], rows[0]["num_shards"]) == (5, 30, 2, 2)
    assert rows[0]["bytes"] == sum(marker.size_bytes for marker in cache.signals["teacher"].markers)
    assert rows[0]["model_source"] == "teachers/big"


def test_lineage_has_every_field_of_every_manifest_overrides_included(tmp_path):
    override = {"stage": "precompute", "allowed": "teacher-mismatch", "found": "another teacher"}
    make_cache(tmp_path, signals={"teacher": {"overrides": [override]}})
    rows = {
        (row["file"], row["key"]): row["value"]
        for row in query(tmp_path, "SELECT * FROM lineage").to_pylist()
    }
    assert rows["lightopd.json", "sampler.identity"] == "student"
    assert rows["lightopd.json", "tokenizer.special_ids.eos.0"] == "1"
    assert rows["lightopd.json", "sampling.temperature"] == "1.0"
    assert rows["signals/teacher/signal.json", "overrides.0.found"] == "another teacher"


def test_an_unfinished_cache_shows_the_shards_that_are_there(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "rollouts" / "part-00001.json").unlink()
    (tmp_path / "signals" / "teacher" / "part-00000.json").unlink()
    assert query(tmp_path, "SELECT count(*) AS n FROM rollouts").to_pylist() == [{"n": 3}]
    assert query(tmp_path, "SELECT count(signal) AS n FROM tokens").to_pylist() == [{"n": 0}]


def test_a_query_follows_the_folder_when_it_moves_and_sees_a_signal_that_came_later(tmp_path):
    cache, _, _ = make_cache(tmp_path / "a")
    build_index(cache)
    shutil.move(tmp_path / "a", tmp_path / "b '1'")
    sql = "SELECT signal, count(*) AS n FROM tokens GROUP BY signal ORDER BY signal"
    assert query(tmp_path / "b '1'", sql).to_pylist() == [{"signal": "teacher", "n": 30}]
    shutil.rmtree(tmp_path / "b '1'")
    make_cache(tmp_path / "b '1'", signals=TWO)
    assert [row["signal"] for row in query(tmp_path / "b '1'", sql).to_pylist()] == ["teacher", "wide"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_file_works_in_duckdb_alone_after_a_move_and_can_be_rebuilt(kind, tmp_path):
    cache, _, _ = make_cache(tmp_path / "a", signals=KINDS[kind])
    first = build_index(cache)
    assert build_index(cache) == first == tmp_path / "a" / "index.duckdb"
    assert not list((tmp_path / "a").glob(".*"))
    wanted = {view: query(tmp_path / "a", f"SELECT * FROM {view}").num_rows for view in VIEWS}
    shutil.move(tmp_path / "a", tmp_path / "b")
    settings = {"file_search_path": str(tmp_path / "b")}
    with duckdb.connect(str(tmp_path / "b" / "index.duckdb"), read_only=True, config=settings) as connection:
        for view, rows in wanted.items():
            assert connection.execute(f"SELECT count(*) FROM {view}").fetchall() == [(rows,)]


def test_duckdb_reads_the_files_alone(tmp_path):
    make_cache(tmp_path)
    files = tmp_path / "signals" / "teacher" / "part-*.parquet"
    with duckdb.connect() as connection:
        sql = f"SELECT count(*), sum(len(topk_ids)) FROM read_parquet('{files}')"
        assert connection.execute(sql).fetchall() == [(5, 120)]


ESCAPES = [
    "SELECT * FROM read_csv('{outside}')",
    "SELECT * FROM read_text('{outside}')",
    "SELECT * FROM read_blob('{outside}')",
    "SELECT * FROM read_parquet('{outside}')",
    "SELECT * FROM read_json('{outside}')",
    "SELECT * FROM '{outside}'",
    "SELECT * FROM read_text('cache://../outside.csv')",
    "SELECT * FROM read_text('cache://rollouts/../../outside.csv')",
    "SELECT * FROM read_text('cache://link.csv')",
    "SELECT * FROM read_text('file://{outside}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM read_parquet('http://localhost:1/x.parquet')",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM query('SELECT * FROM read_text(''{outside}'')')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{outside}'')'))",
    "SELECT * FROM sqlite_scan('{outside}', 't')",
    "SELECT * FROM secret_table_of_the_caller",
    "ATTACH '{outside}' AS other",
    "ATTACH 'cache://new.duckdb' AS other",
    "COPY tokens TO '{folder}/stolen.csv'",
    "COPY tokens TO 'cache://stolen.csv'",
    "WITH x AS (COPY (SELECT 1) TO '{folder}/stolen.csv') SELECT 1",
    "WITH x AS (COPY (SELECT 1) TO 'cache://stolen.csv') SELECT 1",
    "WITH x AS (COPY (SELECT 1) TO 'cache://rollouts/part-00000.parquet') SELECT 1",
    "EXPLAIN ANALYZE COPY tokens TO 'cache://stolen.csv'",
    "EXPLAIN ANALYZE COPY tokens TO '{folder}/stolen.csv'",
    "EXPORT DATABASE '{folder}/stolen'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "RESET enable_external_access",
    "SET allowed_directories = ['/']",
    "SET lock_configuration = false",
    "PRAGMA enable_external_access = true",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{folder}/log')",
    "SELECT * FROM enable_profiling(save_location = '{folder}/profile.json')",
    "CREATE SECRET (TYPE s3)",
    "DROP VIEW tokens",
    "DELETE FROM raw_lineage",
    "CALL pragma_version()",
    "SELECT 1; COPY tokens TO '{folder}/stolen.csv'",
]


@pytest.fixture(scope="module")
def fenced(tmp_path_factory):
    """A cache that no test of this file changes, with a file beside it and a link that leads to that file."""
    folder = tmp_path_factory.mktemp("fenced")
    make_cache(folder / "cache")
    (folder / "outside.csv").write_text("secret,2\n")
    (folder / "cache" / "link.csv").symlink_to(folder / "outside.csv")
    return folder / "cache"


@pytest.mark.parametrize("sql", ESCAPES)
def test_sql_cannot_leave_the_cache_or_change_anything(sql, fenced):
    secret_table_of_the_caller = pa.table({"a": [1]})
    before = snapshot(fenced.parent)
    with pytest.raises(ConfigError) as caught:
        query(fenced, sql.format(outside=fenced.parent / "outside.csv", folder=fenced.parent))
    assert "\n" not in str(caught.value)
    assert snapshot(fenced.parent) == before
    assert secret_table_of_the_caller.num_rows == 1


READS = [
    "FROM tokens LIMIT 3",
    "WITH x AS (SELECT * FROM topk) SELECT count(*) FROM x",
    "DESCRIBE tokens",
    "SUMMARIZE rollouts",
    "SHOW TABLES",
    "EXPLAIN SELECT * FROM tokens",
    "PIVOT signals ON name USING sum(rows)",
    "SELECT * FROM tokens -- a remark",
    "SELECT 1;",
    "SELECT count(*) FROM read_parquet('cache://rollouts/part-*.parquet')",
]


@pytest.mark.parametrize("sql", READS)
def test_every_kind_of_reading_statement_is_answered(sql, fenced):
    assert query(fenced, sql).num_rows > 0


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "cannot be parsed.*syntax error"),
        ("SELECT nothing FROM tokens", 'column "nothing" not found'),
        ("SELECT * FROM nowhere", "nowhere"),
        ("SELECT CAST('x' AS INTEGER)", "Could not convert"),
        ("", "one SQL statement is needed, 0 were found"),
        ("SELECT 1; SELECT 2", "one SQL statement is needed, 2 were found"),
        ("DROP VIEW tokens", "DROP is refused: SQL over a cache only reads"),
    ],
)
def test_wrong_sql_is_one_clear_line(sql, message, fenced):
    with pytest.raises(ConfigError, match=message) as caught:
        query(fenced, sql)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_a_cache_error_that_points_to_verify(tmp_path):
    cache, _, _ = make_cache(tmp_path)
    path = tmp_path / "rollouts" / "part-00001.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    assert open_cache(tmp_path).shards == cache.shards
    with pytest.raises(CacheError, match="lightopd verify"):
        query(tmp_path, "SELECT count(*), max(reward) FROM rollouts")


def test_a_folder_that_is_not_a_cache_is_refused(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        query(tmp_path, "SELECT 1")


def test_every_column_of_every_view_is_documented(tmp_path, pytestconfig):
    make_cache(tmp_path)
    columns = lightopd.open_cache(tmp_path).columns()
    text = (pytestconfig.rootpath / "docs" / "cache.md").read_text()
    for view in VIEWS:
        section = text.split(f"### `{view}`", 1)[1].split("\n#", 1)[0]
        for row in columns:
            if row["view"] == view:
                assert f"| `{row['column']}` | {row['type']} |" in section, (view, row)


def test_the_examples_for_duckdb_and_polars_alone_run_as_documented(tmp_path, pytestconfig):
    _, rollouts, scores = make_cache(tmp_path)
    text = (pytestconfig.rootpath / "docs" / "cache.md").read_text().replace("CACHE/", f"{tmp_path}/")
    gaps = np.concatenate(
        [
            row.logprobs - score.logprobs
            for shard, own in zip(rollouts, scores["teacher"], strict=True)
            for row, score in zip(shard, own, strict=True)
        ]
    )
    with duckdb.connect() as connection:
        rows = connection.execute(text.split("```sql\n")[1].split("```")[0]).fetchall()
    assert np.mean([row[3] for row in rows]) == pytest.approx(gaps.mean(), rel=1e-5)
    found = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    assert found["tokens"].collect()["gap"].mean() == pytest.approx(gaps.mean(), rel=1e-5)
