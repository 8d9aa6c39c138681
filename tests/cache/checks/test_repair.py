"""`lightopd verify --repair` moves what is bad aside, and the stages make that again, byte for byte."""

import json
import shlex
import shutil

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scored_caches import roll, score_with

from lightopd.cache.checks.repair import BAD
from lightopd.cache.shards import write_shard
from lightopd.cache.store import open_cache
from lightopd.cache.tables import rollout_id
from lightopd.config import load_stage
from lightopd.pipelines import rewrite
from lightopd.pipelines.shared.run_folder import writing

ROLLOUTS = "rollouts/part-00001.parquet"
SCORES = "signals/teacher/part-00002.parquet"


@pytest.fixture
def cache(world, tmp_path):
    return shutil.copytree(world.cache, tmp_path / "cache")


def flip(path):
    content = bytearray(path.read_bytes())
    content[min(200, len(content) - 1)] ^= 1
    path.write_bytes(content)


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


def repaired(lightopd, cache, file):
    """Damage a file, repair, run the commands that are told; which stages they were."""
    before = (cache / file).read_bytes()
    flip(cache / file)
    code, out, err = lightopd("verify", cache, "--repair")
    assert code == 0, out + err
    assert (cache / BAD / "00001" / file).exists()
    assert not (cache / file).exists()
    commands = [line.removeprefix("next: ") for line in out.splitlines()]
    for command in commands:
        code, _, err = lightopd(*shlex.split(command)[1:])
        assert code == 0, err
    assert (cache / file).read_bytes() == before
    assert lightopd("verify", cache)[:2] == (0, f"{cache} is whole\n")
    shutil.rmtree(cache / BAD)
    return [shlex.split(command)[1] for command in commands]


def test_a_text_and_the_contexts_of_a_signal_are_made_again_too(lightopd, world, cache):
    prompts = world.root / "prompts.jsonl"
    asked = {"cache": cache, "model": world.teacher, "prompts": prompts, "name": "shown"}
    rewrite.run(load_stage("rewrite", [], [], {**asked, "template": "{{ prompt }}", "gives": "context"}))
    context = {"template": "{{ prompt }}", "prompts": str(prompts)}
    score_with(world, cache, signal="told", top_k=4, context=context)
    score_with(world, cache, "context.text=shown", signal="written", top_k=4)
    assert repaired(lightopd, cache, "texts/shown/part-00001.parquet") == ["rewrite"]
    for name in ("told", "written"):
        assert repaired(lightopd, cache, f"signals/{name}/contexts.parquet") == ["precompute"]


@pytest.mark.parametrize("hidden_format", ["int8", "bfloat16"])
def test_the_head_and_statistics_of_hidden_states_and_a_tail_s_shape_are_made_again(
    lightopd, world, tmp_path, hidden_format
):
    cache = roll(world, tmp_path / "cache")
    score_with(world, cache, f"hidden_format={hidden_format}", signal="states", keep="hidden")
    score_with(world, cache, top_k=4)
    files = [*cache.glob("heads/*"), *cache.glob("signals/*/*.safetensors")]
    assert len(files) == (3 if hidden_format == "int8" else 2)
    for file in files:
        assert repaired(lightopd, cache, file.relative_to(cache)) == ["precompute"]


def test_a_head_that_comes_out_another_does_not_take_the_place_of_the_lost_one(lightopd, world, tmp_path):
    cache = roll(world, tmp_path / "cache")
    score_with(world, cache, "hidden_format=bfloat16", keep="hidden")
    (head,) = cache.glob("heads/*")
    head.unlink()
    asked = ["-c", cache / "signals/teacher/precompute.yaml", "--cache", cache]
    code, _, err = lightopd("precompute", *asked, "--set", "teacher.dtype=bfloat16")
    assert (code, f"{head} is gone, and with these settings on this machine it comes out another" in err) == (
        5,
        True,
    )
    assert not head.exists()


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
