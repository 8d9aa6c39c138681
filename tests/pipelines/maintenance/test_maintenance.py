"""Caches merged, split, listed and cleared: rows and scores stay, and the result says what it was made of."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import make_cache

from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import FolderStore
from lightopd.cache.store import content_id, open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.pipelines import precompute, rollout
from lightopd.pipelines.maintenance.merge import merge
from lightopd.pipelines.maintenance.split import split

PAGE = Path(__file__).parents[3] / "docs/maintenance.md"


def make(world, root, name, lines, seed=0, n=2):
    """A scored cache of some of the world's prompts."""
    prompts = root / f"{name}.jsonl"
    prompts.write_text("\n".join((world.root / "prompts.jsonl").read_text().splitlines()[lines]))
    asked = {"student": world.sft / "student", "prompts": prompts, "cache": root / name}
    sets = ["sampling.max_tokens=6", f"sampling.n={n}", "shard_rollouts=6", f"sampling.seed={seed}"]
    rollout.run(load_stage("rollout", [], sets, asked))
    asked = {"cache": root / name, "teacher": world.teacher, "top_k": 4}
    precompute.run(load_stage("precompute", [], [], asked))
    return root / name


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """Caches `a` and `b` of other prompts, `later` of a's prompts under another seed; read only."""
    root = tmp_path_factory.mktemp("caches")
    make(world, root, "a", slice(0, 6))
    make(world, root, "b", slice(6, 10))
    make(world, root, "later", slice(0, 6), seed=1)
    return root


def rows_of(cache, part="rollouts"):
    files = sorted((cache / part).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file).replace_schema_metadata() for file in files]).to_pylist()


def shards_of(cache, parts=("rollouts", "signals")):
    """Bytes of every shard, marker and manifest."""
    files = (path for part in parts for path in (cache / part).rglob("*.*"))
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in files
        if path.match("part-*") or path.name == "signal.json"
    }


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merged_cache_is_sound_has_all_rows_and_says_what_it_was_made_of(lightopd, made, tmp_path):
    before = files_of(made / "a"), files_of(made / "b")
    out = tmp_path / "both"
    code, told, err = lightopd("cache", "merge", made / "a", made / "b", "--out", out, "--json")
    assert code == 0, err
    assert json.loads(told)["figures"] | {"response_tokens": 0} == {
        "rollouts": 20,
        "response_tokens": 0,
        "prompts": 10,
        "shards": 4,
        "signals": "teacher",
        "texts": "none",
    }
    assert lightopd("verify", out)[:2] == (0, f"{out} is whole\n")
    for part in ("rollouts", "signals/teacher"):
        assert rows_of(out, part) == rows_of(made / "a", part) + rows_of(made / "b", part)
    sources = open_cache(out).manifest.made_of
    assert [each.content for each in sources] == [content_id(open_cache(made / one), ()) for one in "ab"]
    assert (files_of(made / "a"), files_of(made / "b")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


def test_a_merged_signal_is_the_one_that_precompute_finds_done(world, made, tmp_path, caplog):
    merge(tmp_path / "both", [made / "a", made / "b"])
    before = files_of(tmp_path / "both/signals/teacher")
    asked = {"cache": tmp_path / "both", "teacher": world.teacher, "top_k": 4}
    precompute.run(load_stage("precompute", [], [], asked))
    after = files_of(tmp_path / "both/signals/teacher")
    assert {name: after[name] for name in before if name.name.startswith("part")} == {
        name: content for name, content in before.items() if name.name.startswith("part")
    }


def test_prompts_under_another_seed_become_more_samples_of_the_same_groups(made, tmp_path):
    merge(tmp_path / "more", [made / "a", made / "later"])
    assert verify(tmp_path / "more") == []
    rows = rows_of(tmp_path / "more")
    assert sorted({(row["prompt_id"], row["sample_index"]) for row in rows}) == [
        (f"p{prompt}", sample) for prompt in range(6) for sample in range(4)
    ]
    kept = rows_of(made / "a") + rows_of(made / "later")
    assert [row["response_ids"] for row in rows] == [row["response_ids"] for row in kept]


def test_the_same_prompts_under_the_same_seed_are_refused(lightopd, made, tmp_path):
    shutil.copytree(made / "a", tmp_path / "copy")
    code, _, err = lightopd("cache", "merge", made / "a", tmp_path / "copy", "--out", tmp_path / "out")
    assert code == 5
    assert "both have prompt p0 under one seed" in err
    assert not (tmp_path / "out").exists()


def test_other_contracts_and_lonely_signals_are_refused_with_names(world, lightopd, made, tmp_path):
    make(world, tmp_path, "hot", slice(6, 8), n=1)
    code, _, err = lightopd("cache", "merge", made / "a", tmp_path / "hot", "--out", tmp_path / "out")
    assert (code, "sampling.n (2 and 1)" in err) == (4, True)
    shutil.copytree(made / "b", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/signals")
    words = ["cache", "merge", made / "a", tmp_path / "bare", "--out", tmp_path / "out"]
    code, _, err = lightopd(*words)
    assert (code, "has no 'teacher'; make it there, or leave it out with --drop teacher" in err) == (4, True)
    assert lightopd(*words, "--drop", "teachr")[0] == 2
    assert lightopd(*words, "--drop", "teacher")[0] == 0
    assert verify(tmp_path / "out") == []
    code, _, err = lightopd(*words, "--drop", "teacher")
    assert (code, "is there already" in err) == (7, True)


def test_parts_of_a_cache_share_no_prompt_are_sound_and_merge_to_the_same_rows(lightopd, made, tmp_path):
    words = ["cache", "split", made / "a", "--fraction", "0.67,0.33"]
    assert lightopd(*words, "--out", tmp_path / "parts")[0] == 0
    parts = [tmp_path / "parts" / name for name in ("part-1", "part-2")]
    prompts = [{row["prompt_id"] for row in rows_of(part)} for part in parts]
    assert [len(each) for each in prompts] == [4, 2]
    assert not prompts[0] & prompts[1]
    for part, number in zip(parts, "12", strict=True):
        assert verify(part) == []
        (source,) = open_cache(part).manifest.made_of
        assert source.content == content_id(open_cache(made / "a"), ())
        assert source.part == f"{number} of 2"
    assert lightopd(*words, "--out", tmp_path / "again")[0] == 0
    for part in ("part-1", "part-2"):
        first, again = (files_of(tmp_path / name / part / "rollouts") for name in ("parts", "again"))
        assert first == again
    merge(tmp_path / "whole", parts)
    assert verify(tmp_path / "whole") == []
    for part in ("rollouts", "signals/teacher"):
        assert sorted(map(str, rows_of(tmp_path / "whole", part))) == sorted(
            map(str, rows_of(made / "a", part))
        )


def test_fractions_that_are_no_shares_are_refused(lightopd, made, tmp_path):
    for given in (["--fraction", "0.9"], ["--fraction", "0.5,x"], ["--parts", 9], [], ["--fraction", "2,-1"]):
        assert lightopd("cache", "split", made / "a", "--out", tmp_path / "out", *given)[0] == 2
    assert not list(tmp_path.iterdir())


def test_the_list_shows_every_part_and_its_state(lightopd, made, tmp_path):
    shutil.copytree(made / "a", tmp_path / "deep/a")
    (tmp_path / "deep/a/signals/teacher/part-00001.json").unlink()
    rows = json.loads(lightopd("cache", "ls", tmp_path, "--json")[1])
    assert [(row["part"], row["rollouts"], row["shards"], row["state"]) for row in rows] == [
        ("rollouts", 12, "2/2", "complete"),
        ("teacher", 6, "1/2", "unfinished"),
    ]
    assert (rows[1]["kind"], rows[1]["top_k"]) == ("teacher", 4)
    assert "1/2" in lightopd("cache", "ls", tmp_path / "deep/a")[1]
    assert lightopd("cache", "ls", tmp_path / "deep/a/signals")[0] == 5


def test_a_signal_is_dropped_only_when_that_is_said_and_the_index_follows(lightopd, made, tmp_path):
    shutil.copytree(made / "a", tmp_path / "a")
    code, _, err = lightopd("cache", "drop-signal", tmp_path / "a", "teacher")
    assert (code, "give --yes" in err) == (2, True)
    assert (tmp_path / "a/signals/teacher").exists()
    code, out, _ = lightopd("cache", "drop-signal", tmp_path / "a", "teacher", "--yes")
    assert (code, "bytes are freed" in out) == (0, True)
    assert verify(tmp_path / "a") == []
    assert lightopd("sql", tmp_path / "a", "select count(*) as n from signals")[1].split()[-1] == "0"
    code, _, err = lightopd("cache", "drop-signal", tmp_path / "a", "teacher", "--yes")
    assert (code, "has no signal 'teacher'; it has none, and there is nothing to drop" in err) == (5, True)
    assert not list((tmp_path / "a").glob(".lightopd.dropped"))


def test_nothing_is_deleted_while_another_process_makes_shards(lightopd, tmp_path):
    make_cache(tmp_path)
    with Claims(FolderStore(tmp_path / ".lightopd.claims", "signals/second"), 2.0) as other:
        other.take("part-00000")
        before = shards_of(tmp_path)
        for words in (["drop-signal", tmp_path, "teacher", "--yes"], ["gc", tmp_path, "--yes"]):
            code, _, err = lightopd("cache", *words)
            assert (code, f"{other.holder.name} is writing here; wait for it or stop it" in err) == (
                7,
                True,
            ), err
        assert other.holds("part-00000")
    assert shards_of(tmp_path) == before
    assert lightopd("cache", "gc", tmp_path, "--yes")[0] == 0


def test_a_signal_that_another_was_scored_over_is_dropped_after_it(lightopd, tmp_path):
    make_cache(tmp_path, signals={"student": {}, "teacher": {"support": {"signal": "student"}}})
    before = shards_of(tmp_path)
    code, _, err = lightopd("cache", "drop-signal", tmp_path, "student", "--yes")
    told = "signal 'teacher' was scored over the entries of 'student'; drop 'teacher' first"
    assert (code, told in err) == (5, True), err
    assert shards_of(tmp_path) == before
    code, _, err = lightopd("cache", "drop-signal", tmp_path, "third", "--yes")
    assert (code, "has no signal 'third'; name one of student, teacher" in err) == (5, True), err
    for name in ("teacher", "student"):
        assert lightopd("cache", "drop-signal", tmp_path, name, "--yes")[0] == 0


def test_leftovers_are_listed_then_deleted_and_nothing_else_is(lightopd, made, tmp_path):
    cache = tmp_path / "a"
    shutil.copytree(made / "a", cache)
    wanted = files_of(cache)
    (cache / "rollouts/.part-00000.parquet.tmp").write_bytes(b"half")
    (cache / "signals/teacher/part-00009.parquet").write_bytes(b"no marker")
    (cache / ".lightopd.bad/1").mkdir(parents=True)
    (cache / ".lightopd.bad/1/part-00001.parquet").write_bytes(b"bad")
    (cache / ".lightopd.claims/rollouts").mkdir(parents=True)
    there = files_of(cache)
    code, out, _ = lightopd("cache", "gc", cache)
    assert (code, "4 leftovers, 16 bytes, would be deleted with --yes" in out) == (0, True)
    assert files_of(cache) == there
    assert lightopd("cache", "gc", cache, "--yes")[0] == 0
    assert {name: content for name, content in files_of(cache).items() if name.name != ".lightopd.lock"} == {
        name: content for name, content in wanted.items() if name.name != ".lightopd.lock"
    }
    assert not (cache / ".lightopd.bad").exists()
    assert "has no leftovers" in lightopd("cache", "gc", cache)[1]


def test_the_commands_of_the_page_run_as_they_stand_there(lightopd, made, tmp_path, monkeypatch):
    for name, source in (("monday", "a"), ("tuesday", "b")):
        shutil.copytree(made / source, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"<!-- test: maintenance -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines():
        code, _, err = lightopd(*shlex.split(line)[1:])
        assert code == 0, (line, err)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "both", "halves", "monday", "parts", "tuesday",
    ]  # fmt: skip


KILLED = """
import os, signal, sys
from pathlib import Path
from lightopd.pipelines.maintenance import merge, remade, split
write, left = remade.write_shard, [int(sys.argv[1])]
def killed(*arguments, **settings):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments, **settings)
remade.write_shard = killed
out, *sources = map(Path, sys.argv[3:])
merge.merge(out, sources) if sys.argv[2] == "merge" else split.split(out, sources[0], [0.5, 0.5])
"""
DROP_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from lightopd.pipelines.maintenance import clearing
def killed(*arguments, **settings):
    os.kill(os.getpid(), signal.SIGKILL)
moments = {"before": (Path, "rename"), "between": (clearing, "refresh_index"), "after": (clearing, "shutil")}
setattr(*moments[sys.argv[1]], killed)
killed.rmtree = killed
clearing.drop_signal(Path(sys.argv[2]), "teacher", is_sure=True)
"""


def run_killed(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 5])
def test_a_killed_merge_leaves_no_cache_and_untouched_sources(made, tmp_path, shards):
    before = files_of(made / "a")
    run_killed(KILLED, shards, "merge", tmp_path / "out", made / "a", made / "b")
    assert not (tmp_path / "out").exists()
    assert files_of(made / "a") == before
    merge(tmp_path / "out", [made / "a", made / "b"])
    assert verify(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [0, 3])
def test_a_killed_split_leaves_no_part_and_an_untouched_source(made, tmp_path, shards):
    before = files_of(made / "a")
    run_killed(KILLED, shards, "split", tmp_path / "out", made / "a")
    assert not (tmp_path / "out").exists()
    assert files_of(made / "a") == before
    split(tmp_path / "out", made / "a", [0.5, 0.5])
    split(tmp_path / "undisturbed", made / "a", [0.5, 0.5])
    for part in ("part-1", "part-2"):
        assert verify(tmp_path / "out" / part) == []
        assert shards_of(tmp_path / "out" / part) == shards_of(tmp_path / "undisturbed" / part)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "how"),
    [
        ("before", "resumed"),
        ("between", "resumed"),
        ("after", "resumed"),
        ("between", "cleared"),
        ("after", "cleared"),
    ],
)
def test_a_killed_drop_leaves_the_whole_signal_or_none_and_the_rest_untouched(
    lightopd, made, tmp_path, moment, how
):
    cache = shutil.copytree(made / "a", tmp_path / "a")
    run_killed(DROP_KILLED, moment, cache)
    assert shards_of(cache) == shards_of(made / "a", ("rollouts", "signals")[: 1 + (moment == "before")])
    if how == "resumed":
        code, _, err = lightopd("cache", "drop-signal", cache, "teacher")
        assert (code, "would be deleted, 0 bytes" in err) == (2, False), err
        assert lightopd("cache", "drop-signal", cache, "teacher", "--yes")[0] == 0
    else:
        assert "a signal that was dropped" in lightopd("cache", "gc", cache)[1]
        assert lightopd("cache", "gc", cache, "--yes")[0] == 0
    if (moment, how) == ("between", "cleared"):
        assert ["it is stale" in str(finding) for finding in verify(cache)] == [True]
        assert lightopd("index", cache)[0] == 0
    assert verify(cache) == []
    assert not list(cache.glob("signals/*")) + list(cache.glob(".lightopd.dropped"))
    assert shards_of(cache) == shards_of(made / "a", ["rollouts"])


@pytest.mark.slow
def test_a_student_trains_on_a_merged_cache(world, lightopd, made, tmp_path):
    merge(tmp_path / "both", [made / "a", made / "b"])
    words = ["--cache", tmp_path / "both", "--student", world.sft / "student", "--out", tmp_path / "run"]
    sets = ["--set", "batch_sequences=4", "--set", "held_out=0"]
    code, _, err = lightopd("train", *words, "--steps", 2, *sets)
    assert code == 0, err
