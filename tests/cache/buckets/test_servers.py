"""Buckets of two real S3 servers on loopback: races, kills, slow and failing answers."""

import random
import threading
import time

import pytest
from bucket_cases import figures, files_of, race
from bucket_servers import BUCKET, KEYS, Proxy, S3Server
from cache_cases import make_cache

from lightopd.cache.buckets.shard_cache import LIMIT
from lightopd.cache.buckets.stores.bucket import PIECE_BYTES, Bucket
from lightopd.files import file_sha256
from lightopd.training.measures.metrics_rows import read_metrics

pytestmark = pytest.mark.slow
LENGTHS = tuple((40 + number, 50) for number in range(12))
"""Twelve shards, and as many of a signal."""


@pytest.fixture(scope="module", params=["moto", "seaweedfs"])
def server(request, tmp_path_factory):
    server = S3Server(request.param, tmp_path_factory.mktemp(request.param)).start()
    try:
        yield server.make_bucket()
    finally:
        server.kill()


@pytest.fixture
def reach(monkeypatch):
    """Sends the commands of a test to an endpoint."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return lambda endpoint: monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)


def new_url():
    return f"s3://{BUCKET}/{random.randrange(10**12)}"


# moto itself has the race: its threads look for the key and put it without a lock.
@pytest.mark.parametrize("server", ["seaweedfs"], indirect=True)
def test_of_64_writers_of_one_key_exactly_one_wins(server, reach):
    reach(server.endpoint)
    assert race(Bucket(new_url())) == 1


def test_a_cache_comes_back_byte_for_byte(server, reach, lightopd, tmp_path):
    cache, url = make_cache(tmp_path / "cache", lengths=LENGTHS)[0].path, new_url()
    reach(server.endpoint)
    assert figures(lightopd("push", cache, url, "--json"))["shards_sent"] == 24
    assert figures(lightopd("push", cache, url, "--json"))["shards_there_already"] == 24
    lightopd("pull", url, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(cache)
    other = make_cache(tmp_path / "other", lengths=LENGTHS[:3])[0].path
    assert lightopd("push", other, url)[0] == 7


def test_loader_processes_fetch_what_training_reads(server, reach, lightopd, world, tmp_path, monkeypatch):
    """Forks of a process that made requests, with room for one shard: the losses of the folder to the bit."""
    url = new_url()
    reach(server.endpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv(LIMIT, str(max(path.stat().st_size for path in world.cache.rglob("part-*.parquet"))))
    figures(lightopd("push", world.cache, url, "--json"))
    for cache, workers, out in ((world.cache, 0, "local"), (url, 2, "away")):
        asked = ("--cache", cache, "--student", world.sft / "student", "--out", tmp_path / out, "--steps", 4)
        sets = ("batch_sequences=6", "shuffle_gib=0.000001", f"loader_workers={workers}")
        code, _, err = lightopd("train", *asked, *(word for each in sets for word in ("--set", each)))
        assert code == 0, err
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.csv")] for out in ("local", "away")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_file_of_several_pieces_comes_back(server, reach, tmp_path):
    reach(server.endpoint)
    bucket, file = Bucket(new_url()), tmp_path / "large"
    file.write_bytes(random.Random(1).randbytes(2 * PIECE_BYTES + 12345))
    with file.open("rb") as content:
        content.seek(100)
        bucket.put("large", content)
    bucket.download("large", file.stat().st_size, tmp_path / "again", lambda path: None)
    assert file_sha256(tmp_path / "again") == file_sha256(file)


def test_slow_and_cut_answers_are_lived_through(server, reach, lightopd, tmp_path):
    """Every third connection is cut in the middle of its answer, and each piece waits."""
    cache, url = make_cache(tmp_path / "cache", lengths=LENGTHS)[0].path, new_url()
    proxy = Proxy(server.port, delay_s=0.01, is_cut=lambda number: number % 3 == 0)
    try:
        reach(proxy.endpoint)
        assert figures(lightopd("push", cache, url, "--json"))["shards_sent"] == 24
        assert figures(lightopd("pull", url, tmp_path / "again", "--json"))["shards_fetched"] == 24
    finally:
        proxy.close()
    assert proxy.connections >= 6
    assert files_of(tmp_path / "again") == files_of(cache)


def test_a_store_that_never_answers_ends_the_command_in_time(server, reach, lightopd, tmp_path):
    proxy = Proxy(server.port, delay_s=60)
    reach(proxy.endpoint)
    limits = ("--set", "timeout_s=0.5", "--set", "retry_s=1")
    started_s = time.monotonic()
    code, _, err = lightopd("pull", new_url(), tmp_path / "c", *limits)
    proxy.close()
    assert (code, "the store does not answer" in err) == (3, True)
    assert time.monotonic() - started_s < 20


def test_a_server_killed_in_the_middle_of_an_upload(lightopd, reach, tmp_path):
    """Without patience the push ends and the same command resumes; what was pushed is not sent again."""
    cache, url = make_cache(tmp_path / "cache", lengths=LENGTHS)[0].path, new_url()
    server = S3Server("seaweedfs", tmp_path / "server").start()
    try:
        server.make_bucket()
        proxy = Proxy(server.port, after_bytes=60_000, then=server.kill)
        reach(proxy.endpoint)
        code, _, err = lightopd("push", cache, url, "--jobs", 2, "--set", "retry_s=0")
        assert (code, "the store does not answer" in err, "it resumes" in err) == (7, True, True)
        server.start().make_bucket()
        assert lightopd("pull", url, tmp_path / "early")[0] == 5
        resumed = figures(lightopd("push", cache, url, "--json"))
        assert resumed["shards_sent"] + resumed["shards_there_already"] == 24
        assert 0 < resumed["shards_there_already"] < 24
        lightopd("pull", url, tmp_path / "again")
        assert files_of(tmp_path / "again") == files_of(cache)
    finally:
        server.kill()


def test_a_push_waits_for_a_server_that_comes_back(lightopd, reach, tmp_path):
    cache, url = make_cache(tmp_path / "cache", lengths=LENGTHS)[0].path, new_url()
    server = S3Server("seaweedfs", tmp_path / "server").start()

    def restart():
        server.kill()
        threading.Timer(1.0, server.start).start()

    try:
        server.make_bucket()
        proxy = Proxy(server.port, after_bytes=60_000, then=restart)
        reach(proxy.endpoint)
        assert figures(lightopd("push", cache, url, "--json"))["shards_sent"] == 24
        lightopd("pull", url, tmp_path / "again")
        assert files_of(tmp_path / "again") == files_of(cache)
    finally:
        server.kill()


def test_mistakes_are_told_by_their_cause(lightopd, reach, tmp_path, monkeypatch):
    server = S3Server("moto", tmp_path / "server").start()
    try:
        server.make_bucket()
        reach(server.endpoint)
        code, _, err = lightopd("pull", "s3://nobucket/x", tmp_path / "c")
        assert (code, "there is no such bucket; make it" in err) == (3, True)
        code, _, err = lightopd("pull", new_url(), tmp_path / "c")
        assert (code, "is not a cache: there is nothing" in err) == (5, True)
    finally:
        server.kill()
