"""`lightopd verify --repair` moves what is bad aside, and the stages make that again, byte for byte."""

import json
import shlex
import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightopd.cache.checks.repair import BAD
from lightopd.cache.shards import write_shard
from lightopd.cache.store import open_cache
from lightopd.cache.tables import rollout_id
from lightopd.pipelines.shared.run_folder import writing

ROLLOUTS = "rollouts/part-00001.parquet"
SCORES = "signals/teacher/part-00002.parquet"


@pytest.fixture
def cache(world, tmp_path):
    return shutil.copytree(world.cache, tmp_path / "cache")


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])


def shards_of(cache):
    """Bytes of every shard, marker and manifest."""
    patterns = ("lightopd.json", "rollouts/part-*", "signals/*/part-*", "signals/*/signal.json")
    files = [file for pattern in patterns for file in cache.glob(pattern)]
    return {str(file.relative_to(cache)): file.read_bytes() for file in files}


def test_what_is_bad_is_moved_aside_and_made_again_with_the_same_bytes(lightopd, world, cache):
    whole = shards_of(cache)
    untouched = {name: (cache / name).stat().st_ino for name in whole}
    for file in (ROLLOUTS, SCORES):
        flip(cache / file)
    bad = {file: (cache / file).read_bytes() for file in (ROLLOUTS, SCORES)}
    code, out, err = lightopd("verify", cache, "--repair")
    assert code == 0, err
    aside = cache / BAD / "00001"
    assert {file: (aside / file).read_bytes() for file in bad} == bad
    assert f"{cache / ROLLOUTS} moved to {aside / ROLLOUTS}" in err
    commands = [line.removeprefix("next: ") for line in out.splitlines()]
    assert commands == [
        f"lightopd rollout -c {cache}/rollout.yaml --cache {cache}",
        f"lightopd precompute -c {cache}/signals/teacher/precompute.yaml --cache {cache}",
    ]
    assert lightopd("verify", cache)[0] == 5
    for command in commands:
        code, _, err = lightopd(*shlex.split(command)[1:])
        assert code == 0, err
    assert shards_of(cache) == whole
    made = {name for name in whole if (cache / name).stat().st_ino != untouched[name]}
    assert {name.partition(".")[0] for name in made} == {ROLLOUTS[:-8], SCORES[:-8]}
    assert lightopd("verify", cache)[:2] == (0, f"{cache} is whole\n")


def test_a_signal_follows_a_rollout_that_came_out_another(lightopd, world, cache):
    opened, file = open_cache(cache, signals=()), cache / "rollouts/part-00000.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    ids = rows[0]["response_ids"]
    ids[0] = 5 if ids[0] != 5 else 6
    rows[0]["rollout_id"] = rollout_id(
        np.array(rows[0]["prompt_ids"], np.int32),
        np.array(ids, np.int32),
        opened.manifest.sampler.identity,
        rows[0]["sample_index"],
    )
    changed, fingerprint = pa.Table.from_pylist(rows, schema=table.schema), opened.manifest.fingerprint()
    write_shard(file.parent, 0, changed, kind="rollouts", fingerprint=fingerprint, made_from=opened.manifest)
    before = shards_of(cache)
    code, out, _ = lightopd("verify", cache)
    assert (code, "signals/teacher/part-00000.parquet row 0: its rollout_id is not that of" in out) == (
        5,
        True,
    )
    asked = ["precompute", "-c", cache / "signals/teacher/precompute.yaml", "--cache", cache]
    code, _, err = lightopd(*asked)
    assert code == 0, err
    assert lightopd("verify", cache)[0] == 0
    after = shards_of(cache)
    assert {name for name in after if after[name] != before[name]} == {
        "signals/teacher/part-00000.parquet",
        "signals/teacher/part-00000.json",
    }


def test_what_cannot_be_made_again_is_told_and_stays(lightopd, cache):
    file = cache / "lightopd.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps({**plain, "vocabulary_size": 9}))
    before = shards_of(cache)
    code, out, _ = lightopd("verify", cache, "--repair")
    assert code == 5
    assert out.startswith("not mended: lightopd.json: it is ")
    assert f"move it away and run `lightopd verify {cache} --restore`" in out
    assert shards_of(cache) == before
    file.unlink()
    assert lightopd("verify", cache, "--restore")[:2] == (0, f"{cache} is whole\n")


def test_a_stale_index_is_built_again_and_the_old_one_kept(lightopd, cache):
    (cache / "index.duckdb").write_bytes(b"x" * 4096)
    code, out, _ = lightopd("verify", cache, "--repair", "--json")
    assert (code, json.loads(out)["moved"]) == (0, {"index.duckdb": f"{BAD}/00001/index.duckdb"})
    assert lightopd("verify", cache)[0] == 0


def test_an_index_of_an_older_version_may_say_less_but_nothing_else(lightopd, cache):
    def change(statement):
        with duckdb.connect(str(cache / "index.duckdb"), config={"file_search_path": str(cache)}) as index:
            index.execute(statement)

    assert lightopd("index", cache)[0] == 0
    change("DELETE FROM raw_lineage WHERE key = (SELECT min(key) FROM raw_lineage)")
    assert lightopd("verify", cache)[0] == 0
    change("UPDATE raw_lineage SET value = 'other' WHERE key = (SELECT min(key) FROM raw_lineage)")
    code, out, err = lightopd("verify", cache)
    assert (code, "it is stale: lineage in it and in the cache differ" in out + err) == (5, True)


def test_each_repair_has_a_folder_of_its_own(lightopd, cache):
    for number in (1, 2):
        (cache / "rollouts" / "part-00099.parquet").write_bytes(b"")
        assert lightopd("verify", cache, "--repair")[0] == 0
        assert (cache / BAD / f"0000{number}" / "rollouts" / "part-00099.parquet").exists()


def test_a_repair_waits_for_nobody_and_is_not_combined_with_scoring(lightopd, cache):
    with writing(cache):
        code, _, err = lightopd("verify", cache, "--repair")
    assert (code, "another lightopd process is writing here" in err) == (7, True)
    assert lightopd("verify", cache, "--repair", "--rescore", "2")[0] == 2


def test_without_it_the_command_names_the_file_and_ends_with_code_5(lightopd, cache):
    flip(cache / ROLLOUTS)
    code, out, _ = lightopd("verify", cache)
    assert (code, out.startswith(f"{ROLLOUTS}: its SHA-256 is not the one in its marker")) == (5, True)
