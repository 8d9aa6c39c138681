"""A cache made where it lies: a folder as an object store."""

from pathlib import Path

import pyarrow as pa
import pytest
from cache_cases import make_cache

from lightopd.cache.buckets.places import place_of
from lightopd.cache.reader import read_columns
from lightopd.cache.shards import put_shard, read_marker
from lightopd.cache.store import open_cache
from lightopd.schemas.cache import ROLLOUTS


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
    assert {path.name for path in bucket.glob("rollout.*")} == {"rollout.yaml", "rollout.report.json"}
    assert open_cache(Path(url)).num_rollouts == open_cache(world.cache).num_rollouts
    code, _, err = lightopd("rollout", *asked, *sets, "--cache", url, "--exclusive")
    assert (code, "leave out --exclusive" in err) == (7, True)
    (bucket / "lightopd.json").unlink()
    (bucket / "rollouts/.lightopd.push").write_text("{}")
    code, _, err = lightopd("rollout", *asked, *sets, "--cache", url)
    assert (code, "is half pushed" in err) == (7, True)
