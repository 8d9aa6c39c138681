"""A cache made where it lies: a folder as an object store."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from bucket_cases import files_of
from cache_cases import make_cache

from lightopd.cache.buckets.places import place_of
from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.reader import read_columns
from lightopd.cache.shards import put_shard, read_marker
from lightopd.cache.store import open_cache
from lightopd.pipelines.caches.push import push_rollouts
from lightopd.schemas.cache import ROLLOUTS


def url_of(folder):
    return f"file://{folder}"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """What two machines write to one URL through."""
    made = []
    for name in ("one", "other"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        made.append(place_of(Path(f"file://{tmp_path}/bucket")))
    return made


def test_a_laggard_does_not_touch_a_finished_shard(tmp_path, places):
    cache = make_cache(tmp_path / "cache")[0]
    table, fingerprint = read_columns(cache, 0, ROLLOUTS.names), cache.manifest.fingerprint()
    rewards = pa.array([0.25] * table.num_rows, ROLLOUTS.field("reward").type)
    other = table.set_column(table.column_names.index("reward"), ROLLOUTS.field("reward"), rewards)
    one, late = places
    settings = {"kind": "rollouts", "fingerprint": fingerprint}
    first = put_shard(one.folder / "rollouts", 0, table, place=one, **settings)
    second = put_shard(late.folder / "rollouts", 0, other, place=late, **settings)
    assert second == first == read_marker(tmp_path / "bucket/rollouts", 0)
    assert (tmp_path / "bucket/rollouts/part-00000.parquet").read_bytes() == cache.file(0).read_bytes()


def test_what_a_killed_process_left_without_a_marker_is_kept_where_it_is_whole(tmp_path, places):
    cache = make_cache(tmp_path / "cache")[0]
    table, fingerprint = read_columns(cache, 0, ROLLOUTS.names), cache.manifest.fingerprint()
    one = places[0]
    settings = {"kind": "rollouts", "fingerprint": fingerprint, "place": one}
    for left in (b"half", cache.file(0).read_bytes()):
        one.replace(one.folder / "rollouts/part-00000.parquet", left)
        found = put_shard(one.folder / "rollouts", 0, table, **settings)
        assert found.sha256 == cache.marker(0).sha256
        one.remove(one.folder / "rollouts/part-00000.json")
    assert [path.name for path in (tmp_path / "bucket/rollouts").iterdir()] == ["part-00000.parquet"]


def test_stages_write_a_url_as_they_write_a_folder(lightopd, world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    url, bucket = f"file://{tmp_path}/bucket", tmp_path / "bucket"
    asked = ("--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl", "--n", 2)
    sets = ("--set", "sampling.max_tokens=10", "--set", "shard_rollouts=6")
    for _ in range(2):  # the second finds all of it there
        code, _, err = lightopd("rollout", *asked, *sets, "--cache", url)
        assert code == 0, err
        code, _, err = lightopd(
            "precompute", "--cache", url, "--teacher", world.teacher, "--top-k", 4, "--json"
        )
        assert code == 0, err
    for part in ("rollouts", "signals/teacher"):
        for path in (world.cache / part).glob("part-*"):
            assert (bucket / part / path.name).read_bytes() == path.read_bytes()
    assert not [path for path in bucket.rglob("*") if path.is_file() and ".claims" in str(path)]
    for name in ("rollout.report.json", "signals/teacher/precompute.report.json"):
        assert json.loads((bucket / name).read_text())["out"].startswith(url)
    assert {path.name for path in bucket.glob("rollout.*")} == {"rollout.yaml", "rollout.report.json"}
    assert open_cache(Path(url)).num_rollouts == open_cache(world.cache).num_rollouts
    (bucket / "lightopd.json").unlink()
    (bucket / "rollouts/.lightopd.push").write_text("{}")
    code, _, err = lightopd("rollout", *asked, *sets, "--cache", url)
    assert (code, "is half pushed" in err) == (7, True)


def test_precompute_brings_the_rollouts_of_another_cache_to_a_url(lightopd, world, tmp_path, monkeypatch):
    """From a folder, and from a URL; a copy that was cut is resumed, and another cache is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    asked, source = ("--teacher", world.teacher, "--top-k", 4), world.cache
    for bucket in (tmp_path / "first", tmp_path / "second"):
        code, _, err = lightopd("precompute", "--rollouts", source, "--cache", url_of(bucket), *asked)
        assert code == 0, err
        for part in ("rollouts", "signals/teacher"):
            for path in (world.cache / part).glob("part-*"):
                assert (bucket / part / path.name).read_bytes() == path.read_bytes()
        source = url_of(bucket)
    for name in ("lightopd.json", "rollouts/part-00001.json"):
        (bucket / name).unlink()
    code, _, err = lightopd("precompute", "--rollouts", world.cache, "--cache", url_of(bucket), *asked)
    assert (code, (bucket / "lightopd.json").exists()) == (0, True), err
    other = make_cache(tmp_path / "other")[0].path
    taken = url_of(tmp_path / "taken")
    assert lightopd("push", other, taken)[0] == 0
    code, _, err = lightopd("precompute", "--rollouts", world.cache, "--cache", taken, *asked)
    assert (code, f"{taken} belongs to another run" in err) == (7, True), err


def test_other_settings_are_refused_and_nothing_at_the_url_is_touched(lightopd, world, tmp_path, monkeypatch):
    """On a machine that has never read the cache, whose mirror has no shard."""
    url, bucket = url_of(tmp_path / "bucket"), tmp_path / "bucket"
    assert lightopd("push", world.cache, url)[0] == 0
    before = files_of(bucket)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    asked = ("--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl", "--n", 2)
    sets = ("--set", "sampling.max_tokens=10", "--set", "shard_rollouts=6")
    code, _, err = lightopd("rollout", *asked, *sets, "--cache", url, "--temperature", 0.5)
    assert (code, f"{url} belongs to another run (sampling.temperature" in err) == (7, True), err
    code, _, err = lightopd("precompute", "--cache", url, "--teacher", world.teacher, "--top-k", 3)
    assert (code, f"{url}/signals/teacher belongs to another run (top_k" in err) == (7, True), err
    after = files_of(bucket)
    assert {name: content for name, content in after.items() if ".claims/" not in name} == before


def test_a_shard_that_gives_room_while_it_is_sent_on_is_sent_whole(lightopd, tmp_path, monkeypatch):
    """As where another process, or thread, needs the room at that moment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    made, put = make_cache(tmp_path / "made")[0].path, Bucket.put
    assert lightopd("push", made, url_of(tmp_path / "first"))[0] == 0
    source = open_cache(Path(url_of(tmp_path / "first")), signals=())

    def gone(bucket, name, content):
        (source.path / name).unlink()
        put(bucket, name, content)

    monkeypatch.setattr(Bucket, "put", lambda *given: (gone if "parquet" in given[1] else put)(*given))
    push_rollouts(source, url_of(tmp_path / "second"))
    for path in (made / "rollouts").glob("part-*"):
        assert (tmp_path / "second/rollouts" / path.name).read_bytes() == path.read_bytes()


def test_exclusive_leaves_nothing_behind_at_a_url(lightopd, world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    url, bucket = f"file://{tmp_path}/bucket", tmp_path / "bucket"
    lightopd("push", world.cache, url)
    asked = ("--teacher", world.teacher, "--top-k", 4, "--signal", "second", "--exclusive")
    code, out, err = lightopd("precompute", "--cache", url, *asked, "--json")
    assert code == 0, err
    assert json.loads(out)["out"] == f"{url}/signals/second"
    assert not [path for path in bucket.rglob("*") if path.is_file() and ".claims" in str(path)]
    for path in (world.cache / "signals/teacher").glob("part-*.parquet"):
        assert (bucket / "signals/second" / path.name).exists()
