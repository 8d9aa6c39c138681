"""`lightopd push` and `lightopd pull` on a folder as an object store; the S3 servers are in test_servers."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bucket_cases import figures, files_of, race
from cache_cases import make_cache

from lightopd.cache.buckets.layout import RECORD
from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.errors import InputError, OutputError
from lightopd.files import write_atomically
from lightopd.pipelines.shared.run_folder import writing

OLD = Path(__file__).parents[2] / "fixtures/version_0_1/cache"

KILLED = """
import os, signal, sys
from lightopd import files
from lightopd.cache.buckets.stores.bucket import Bucket
files.flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)
getattr(Bucket(sys.argv[1], is_made=True), sys.argv[2])("rollouts/key", b"content")
"""


@pytest.fixture
def cache(tmp_path):
    return make_cache(tmp_path / "cache")[0].path


@pytest.fixture
def store(tmp_path):
    """A folder, and its URL."""
    return tmp_path / "bucket", f"file://{tmp_path}/bucket"


def test_a_cache_comes_back_byte_for_byte_and_nothing_is_sent_twice(lightopd, tmp_path, store):
    sent = figures(lightopd("push", OLD, store[1], "--json"))
    assert (sent["shards_sent"], sent["shards_there_already"]) == (6, 0)
    assert files_of(store[0]) == files_of(OLD)
    assert figures(lightopd("push", OLD, store[1], "--json"))["bytes_sent"] == 0
    fetched = figures(lightopd("pull", store[1], tmp_path / "again", "--json"))
    assert fetched["bytes_fetched"] == sent["bytes_sent"]
    assert files_of(tmp_path / "again") == files_of(OLD)
    assert figures(lightopd("pull", store[1], tmp_path / "again", "--json"))["shards_fetched"] == 0
    assert lightopd("verify", tmp_path / "again")[0] == 0


def test_a_push_that_was_cut_is_seen_as_such_and_resumed(lightopd, tmp_path, cache, store):
    lightopd("push", cache, store[1])
    for name in ("lightopd.json", "signals/teacher/signal.json", "rollouts/part-00001.json"):
        (store[0] / name).unlink()
    code, _, err = lightopd("pull", store[1], tmp_path / "again")
    assert (code, "is half pushed (4 shards are there)" in err) == (5, True)
    assert not (tmp_path / "again").exists()
    resumed = figures(lightopd("push", cache, store[1], "--json"))
    assert (resumed["shards_sent"], resumed["shards_there_already"]) == (1, 3)
    assert files_of(store[0]) == files_of(cache)


def test_a_pull_that_was_cut_is_seen_as_such_and_resumed(lightopd, tmp_path, cache, store):
    lightopd("push", cache, store[1])
    lost = store[0] / "signals/teacher/part-00001.parquet"
    content = lost.read_bytes()
    lost.write_bytes(content[:-1] + b"?")
    code, _, err = lightopd("pull", store[1], tmp_path / "again", "--jobs", 1)
    assert (code, "part-00001.parquet has SHA-256" in err) == (5, True)
    code, _, err = lightopd("verify", tmp_path / "again")
    assert (code, f"run `lightopd pull {store[1]} {tmp_path / 'again'}` again" in err) == (5, True)
    lost.write_bytes(content)
    assert figures(lightopd("pull", store[1], tmp_path / "again", "--json"))["shards_there_already"] >= 2
    assert files_of(tmp_path / "again") == files_of(cache)
    assert not list((tmp_path / "again").rglob("*.tmp"))
    assert lightopd("verify", tmp_path / "again")[0] == 0


def test_a_pull_that_was_killed_before_its_first_file_is_resumed(lightopd, tmp_path, cache, store):
    lightopd("push", cache, store[1])
    (tmp_path / "again").mkdir()
    (tmp_path / "again/.lightopd.lock").touch()
    (tmp_path / "again/..lightopd.pull.tmp").write_text("file:")
    assert lightopd("pull", store[1], tmp_path / "again")[0] == 0
    assert files_of(tmp_path / "again") == files_of(cache)


def test_what_a_killed_push_left_half_written_in_a_folder_is_hidden_and_goes(store):
    for do in ("put", "put_if_absent"):
        subprocess.run([sys.executable, "-c", KILLED, store[1], do])
        assert len(list((store[0] / "rollouts").iterdir())) == 1
        assert Bucket(store[1]).sizes() == {}
        assert Bucket(store[1]).names_below("rollouts") == []
        Bucket(store[1], is_made=True)
        assert list((store[0] / "rollouts").iterdir()) == []


def test_another_cache_is_never_mixed_in(lightopd, tmp_path, cache, store):
    lightopd("push", cache, store[1])
    before = files_of(store[0])
    other = make_cache(tmp_path / "other", lengths=((4, 4), (2, 6)))[0].path
    for is_whole in (True, False):
        code, _, err = lightopd("push", other, store[1])
        assert (code, "belongs to another cache, whole or half pushed" in err) == (7, True)
        assert files_of(store[0]) == before
        if is_whole:  # half pushed is as good as taken
            del before["lightopd.json"]
            (store[0] / "lightopd.json").unlink()
    code, _, err = lightopd("pull", f"file://{tmp_path}/other-bucket", other)
    assert (code, "there is no folder" in err) == (3, True)


def test_a_cache_that_another_tool_copied_is_completed_but_never_overwritten(
    lightopd, tmp_path, cache, store
):
    shutil.copytree(cache, store[0])
    (store[0] / "rollouts/part-00001.json").unlink()
    other = make_cache(tmp_path / "other", lengths=((4, 4), (2, 6)))[0].path
    code, _, err = lightopd("push", other, store[1])
    assert (code, "belongs to a cache of" in err) == (7, True)
    assert not (store[0] / "rollouts" / RECORD).exists()
    assert figures(lightopd("push", cache, store[1], "--json"))["shards_sent"] == 1


def test_a_folder_with_something_else_is_left_alone(lightopd, tmp_path, cache, store):
    lightopd("push", cache, store[1])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("mine")
    code, _, err = lightopd("pull", store[1], tmp_path / "notes")
    assert (code, "is not empty and not a cache" in err) == (7, True)
    other = make_cache(tmp_path / "other", lengths=((4, 4), (2, 6)))[0].path
    code, _, err = lightopd("pull", store[1], other)
    assert (code, "holds another cache than the URL" in err) == (7, True)
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["todo.txt"]


def test_signals_travel_one_by_one(lightopd, tmp_path, store):
    cache = make_cache(tmp_path / "cache", {"teacher": {}, "second": {"top_k": 2}})[0].path
    lightopd("push", cache, store[1], "--signal", "teacher")
    assert not (store[0] / "signals/second").exists()
    code, _, err = lightopd("pull", store[1], tmp_path / "again", "--signal", "second")
    assert (code, "signal 'second' is not there" in err) == (5, True)
    sent = figures(lightopd("push", cache, store[1], "--json"))
    assert (sent["shards_sent"], sent["shards_there_already"]) == (2, 4)
    lightopd("pull", store[1], tmp_path / "again", "--signal", "second")
    assert [path.name for path in (tmp_path / "again/signals").iterdir()] == ["second"]


def test_heads_of_hidden_states_travel_and_are_compared(lightopd, tmp_path, cache, store):
    name = f"heads/{hashlib.sha256(b'head').hexdigest()}.safetensors"
    write_atomically(cache / name, b"head")
    lightopd("push", cache, store[1])
    lightopd("pull", store[1], tmp_path / "again")
    assert files_of(tmp_path / "again")[name] == b"head"
    (store[0] / name).write_bytes(b"beef")
    code, _, err = lightopd("pull", store[1], tmp_path / "third")
    assert (code, f"{name} has SHA-256" in err) == (5, True)


def test_a_damaged_shard_is_not_sent(lightopd, cache, store):
    shard = cache / "rollouts/part-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    code, _, err = lightopd("push", cache, store[1])
    assert (code, f"{shard} does not have the SHA-256 in its marker" in err) == (5, True)
    assert not (store[0] / "lightopd.json").exists()


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("memory:///x", 2, "no URL of a store"),
        ("bucket/folder", 2, "no URL of a store"),
        ("file:///nowhere/at/all", 3, "there is no folder /nowhere/at/all"),
    ],
)
def test_a_url_that_no_store_takes_is_refused_in_one_line(lightopd, tmp_path, url, code, message):
    found, out, err = lightopd("pull", url, tmp_path / "c")
    assert (found, out, len(err.strip().splitlines())) == (code, "", 1)
    assert message in err


def test_an_option_that_the_store_does_not_know_is_refused(lightopd, tmp_path):
    code, _, err = lightopd("pull", "s3://bucket/x", tmp_path / "c", "--set", "store.endpint=x")
    assert (code, "endpint" in err) == (2, True)
    code, _, err = lightopd("pull", "s3://bucket/x", tmp_path / "c", "--set", "timeout=1")
    assert (code, "unknown key timeout" in err) == (2, True)


def test_a_store_that_does_not_answer_is_told_with_what_to_look_at(lightopd, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    code, _, err = lightopd("pull", "s3://bucket/x", tmp_path / "c", "--set", "retry_s=0.3")
    assert (code, "does not answer (tried again for 0.3 s); look at AWS_ENDPOINT_URL" in err) == (3, True)


def test_of_64_that_put_one_object_exactly_one_is_told_that_it_did(store):
    assert race(Bucket(store[1], is_made=True)) == 1


def test_reading_what_is_gone_names_the_object(store, tmp_path):
    bucket = Bucket(store[1], is_made=True)
    assert bucket.read("nothing") is None
    with pytest.raises(InputError, match="nothing: it is not there"):
        bucket.download("nothing", 3, tmp_path / "file", lambda path: None)
    assert not list(tmp_path.glob("*file*"))


def test_a_url_in_the_place_of_a_folder_is_refused_with_the_way_round(lightopd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = lightopd("push", "s3://bucket/x", "s3://bucket/y")
    assert (code, "`lightopd pull s3://bucket/x CACHE` first" in err) == (5, True)
    with pytest.raises(OutputError, match="then `lightopd push` it"), writing(Path("s3://bucket/x")):
        pass
    assert not list(tmp_path.iterdir())
