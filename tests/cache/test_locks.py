"""One writer at a time at every door of a cache, and an index that never fails a finished stage."""

import errno
import fcntl
import os
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crowd import shards_of, until

from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import FolderStore
from lightopd.pipelines.shared.run_folder import writing


@pytest.fixture
def official(tmp_path):
    """A file as Lightning-OPD writes it."""
    metadata = {"prompt_tokens": [3, 4, 5], "response_tokens": [6, 7], "teacher_log_probs": [-0.5, -1.0]}
    pq.write_table(
        pa.Table.from_pylist([{"prompt": "1+1=", "metadata": metadata}]), tmp_path / "rows.parquet"
    )
    return tmp_path / "rows.parquet"


def test_import_and_index_wait_for_nobody(lightopd, world, tmp_path, official):
    cache = tmp_path / "cache"
    made = ["import", official, "--cache", cache, "--tokenizer", world.teacher]
    cache.mkdir()
    with writing(cache):
        code, _, err = lightopd(*made)
        assert (code, "another lightopd process is writing here" in err) == (7, True)
    assert lightopd(*made)[0] == 0
    with writing(cache):
        code, _, err = lightopd("index", cache)
        assert (code, "another lightopd process is writing here" in err) == (7, True)
        code, _, err = lightopd("verify", cache, "--restore")
        assert (code, "another lightopd process is writing here" in err) == (7, True)
    assert lightopd("index", cache)[0] == 0


def test_a_finished_stage_does_not_fail_for_its_index(lightopd, world, copied, caplog):
    (copied / "index.duckdb").unlink(missing_ok=True)
    (copied / "index.duckdb" / "in the way").mkdir(parents=True)
    asked = ["precompute", "--cache", copied, "--teacher", world.teacher, "--top-k", "4"]
    code, _, err = lightopd(*asked)
    assert code == 0, err
    assert f"`lightopd index {copied}` builds it later" in err


@pytest.fixture
def copied(world, tmp_path):
    return shutil.copytree(world.cache, tmp_path / "copied")


def test_two_columns_of_one_name_are_told_apart_in_every_format(lightopd, world, tmp_path):
    for format in ("table", "markdown", "csv", "json"):
        code, out, err = lightopd("sql", world.cache, "select 1 as x, 2 as x", "--format", format)
        assert (code, "x_1" in out, "1" in out, "2" in out) == (0, True, True, True), err


@pytest.fixture
def without_locks(monkeypatch):
    """A file system without file locks, as some network ones are."""

    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_file_locks_claims_share_the_shards_all_the_same(lightopd, world, copied, without_locks):
    folder, seen = copied / "signals/teacher", []
    shutil.rmtree(folder)
    other = Claims(FolderStore(copied / ".lightopd.claims", "signals/teacher"), 3600)
    other.take("part-00001")

    def let_go():
        until(lambda: len(list(folder.glob("part-*.json"))) == 3, 300)
        seen.extend(shards_of(folder))
        other.release("part-00001")

    holder = threading.Thread(target=let_go)
    holder.start()
    code, _, err = lightopd("precompute", "--cache", copied, "--teacher", world.teacher, "--top-k", 4)
    holder.join()
    assert code == 0, err
    assert len(seen) == 6
    assert not any("part-00001" in name for name in seen)
    assert shards_of(folder) == shards_of(world.cache / "signals/teacher")


def test_without_file_locks_exclusive_is_refused_with_what_to_do(lightopd, world, copied, without_locks):
    shutil.rmtree(copied / "signals")
    asked = ["precompute", "--cache", copied, "--teacher", world.teacher, "--top-k", 4, "--exclusive"]
    code, _, err = lightopd(*asked)
    assert code == 7, err
    assert f"{copied}: its file system has no locks ({os.strerror(errno.ENOLCK)})" in err
    assert "name a folder on another one" in err
    assert not (copied / "signals").exists()
