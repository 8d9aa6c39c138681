"""A cache read where it lies: a folder as an object store; S3 servers are in test_servers."""

import json
import os
from pathlib import Path

import duckdb
import pytest
from bucket_cases import figures
from cache_cases import make_cache

import lightopd as package
from lightopd.cache.buckets.mirrors import bring, mirrors_folder
from lightopd.cache.buckets.shard_cache import LIMIT
from lightopd.cache.reader import read_shard_columns
from lightopd.cache.shards import read_marker
from lightopd.cache.sql.fence import ReadOnlyFolder
from lightopd.cache.sql.views import make_views
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.errors import CacheError
from lightopd.training.measures.metrics_rows import read_metrics


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0].path


@pytest.fixture
def store(tmp_path, monkeypatch, lightopd, cache):
    """The folder of the pushed cache, and its URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    figures(lightopd("push", cache, f"file://{tmp_path}/bucket", "--json"))
    return tmp_path / "bucket", f"file://{tmp_path}/bucket"


def shards_here():
    """Shards of all mirrors, with the name of the part, sorted."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in mirrors_folder().rglob("part-*.parquet"))


def rows(done):
    code, out, err = done
    assert code == 0, err
    return json.loads(out)["rows"]


def test_opening_fetches_no_shard_and_reading_fetches_those_that_are_read(store, cache):
    opened = open_cache(Path(store[1]))
    assert (opened.num_tokens, shards_here()) == (open_cache(cache).num_tokens, [])
    found = read_shard_columns(opened, 1)
    assert shards_here() == ["rollouts/part-00001"]
    assert found.rollout_ids == read_shard_columns(open_cache(cache), 1).rollout_ids


def test_commands_read_the_url_as_they_read_the_folder(lightopd, store, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = "select rollout_id, pos, signal, logprob_signal from tokens order by all"
    assert rows(lightopd("sql", store[1], asked, "--json")) == rows(lightopd("sql", cache, asked, "--json"))
    assert lightopd("verify", store[1])[:2] == (0, f"{store[1]} is whole\n")
    assert lightopd("report", store[1], "--no-check")[0] == 0
    assert store[1] in (tmp_path / "report.html").read_text()
    assert lightopd("export", store[1], tmp_path / "dataset")[0] == 0
    assert store[1] in repr(package.open_cache(store[1]))


def test_what_only_asks_for_numbers_of_rows_fetches_no_shard(lightopd, store):
    assert rows(lightopd("sql", store[1], "select count(*) as n from rollouts", "--json")) == [[5]]
    assert shards_here() == []


def test_of_large_shards_sql_fetches_the_columns_that_it_reads(tmp_path, monkeypatch, lightopd):
    """DuckDB asks for a megabyte at a time, from where a column begins in a row group."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    wide = {"teacher": {"top_k": 40}}
    cache = make_cache(tmp_path / "cache", wide, lengths=((3000,) * 10,))[0]
    lightopd("push", cache.path, f"file://{tmp_path}/bucket")
    opened = open_cache(Path(f"file://{tmp_path}/bucket"))
    folder = ReadOnlyFolder(opened.path, whole_bytes=0)
    with duckdb.connect() as connection:
        connection.register_filesystem(folder)
        make_views(connection, opened, "cache://")
        asked = "select sum(list_sum(logprobs)) from raw_signals"
        found = connection.sql(asked).fetchall()
    with duckdb.connect() as connection:
        make_views(connection, cache, f"{cache.path}/")
        assert connection.sql(asked).fetchall() == found
    fetched = sum(len(block) for (name, _), block in folder.ranges._blocks.items() if "teacher" in name)
    assert 0 < fetched < cache.signals["teacher"].markers[0].size_bytes / 2
    assert shards_here() == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_gives_the_same_losses_to_the_last_bit(world, lightopd, tmp_path, monkeypatch, workers):
    """With room for one shard, and memory for less: every shard is fetched again and again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    url, student = f"file://{tmp_path}/bucket", world.sft / "student"
    lightopd("push", world.cache, url)
    largest = max(path.stat().st_size for path in world.cache.rglob("part-*.parquet"))
    monkeypatch.setenv(LIMIT, str(largest))
    for cache, out in ((world.cache, "local"), (url, "away")):
        sets = ("--set", "batch_sequences=6", "--set", "shuffle_gib=0.000001")
        sets += ("--set", f"loader_workers={workers if out == 'away' else 0}")
        asked = ("--cache", cache, "--student", student, "--out", tmp_path / out, "--steps", 4, *sets)
        code, _, err = lightopd("train", *asked)
        assert code == 0, err
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.csv")] for out in ("local", "away")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert len(shards_here()) == 1


def test_the_shards_used_least_recently_make_room(store, monkeypatch):
    opened = open_cache(Path(store[1]))
    read_shard_columns(opened, 0, ("teacher",))
    read_shard_columns(opened, 0)
    sizes = [opened.marker(0).size_bytes, opened.marker(1).size_bytes]
    monkeypatch.setenv(LIMIT, str(sum(sizes)))
    read_shard_columns(opened, 1)
    assert shards_here() == ["rollouts/part-00000", "rollouts/part-00001"]


def test_verify_names_what_is_wrong_at_the_url(store):
    (store[0] / "rollouts/part-00007.parquet").write_bytes(b"?")
    lost, flipped = store[0] / "signals/teacher/part-00000.parquet", store[0] / "rollouts/part-00001.parquet"
    lost.unlink()
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    found = [str(finding) for finding in verify(Path(store[1]))]
    assert "rollouts/part-00007.parquet: it is not one of the cache's 2 shards" in found[0]
    assert "signals/teacher/part-00000.parquet" in found[1]
    assert "missing" in found[1]
    assert f"{store[1]}/rollouts/part-00001.parquet has SHA-256" in found[2]
    with pytest.raises(CacheError, match="missing"):
        open_cache(Path(store[1]))


def test_what_changed_at_the_url_is_seen_by_the_next_command(store, tmp_path, lightopd):
    read_shard_columns(open_cache(Path(store[1])), 0)
    for path in sorted(store[0].rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    other = make_cache(tmp_path / "other", {"second": {}}, lengths=((4, 4), (2, 6)))[0]
    lightopd("push", other.path, store[1])
    found = open_cache(Path(store[1]))
    assert (list(found.signals), shards_here()) == (["second"], [])
    assert read_shard_columns(found, 0).rollout_ids == read_shard_columns(other, 0).rollout_ids


def test_a_copy_that_was_damaged_here_is_fetched_again(store):
    opened = open_cache(Path(store[1]))
    read_shard_columns(opened, 0)
    copy, marker = opened.file(0), opened.marker(0)
    before = copy.stat()
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CacheError, match="has SHA-256"):
        read_shard_columns(opened, 0)
    read_shard_columns(opened, 0)
    assert copy.stat().st_size == marker.size_bytes


def test_a_fork_fetches_too(store):
    """A loader process is one, and has none of the threads that its parent's requests go through."""
    opened = open_cache(Path(store[1]))
    read_shard_columns(opened, 0)
    child = os.fork()
    if child == 0:
        bring(opened.file(1), opened.marker(1).sha256)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert "rollouts/part-00001" in shards_here()


def test_what_writes_refuses_a_url_and_a_url_without_a_cache_is_named(lightopd, store, tmp_path):
    for command in (("index",), ("verify", "--repair"), ("verify", "--restore")):
        code, _, err = lightopd(command[0], store[1], *command[1:])
        assert (code, "then `lightopd push` it there" in err) == (7, True), command
    (store[0] / "lightopd.json").unlink()
    code, _, err = lightopd("sql", store[1], "from rollouts")
    assert (code, "is half pushed (4 shards are there)" in err) == (5, True)
    (tmp_path / "empty").mkdir()
    code, _, err = lightopd("verify", f"file://{tmp_path}/empty")
    assert (code, "is not a cache: there is nothing" in err) == (5, True)
    code, _, err = lightopd("verify", "ftp://host/cache")
    assert (code, "is no URL of a store" in err) == (2, True)
    assert read_marker(store[0] / "rollouts", 0) is not None
