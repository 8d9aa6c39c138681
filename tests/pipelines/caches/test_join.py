"""One cache of a teacher's answers and a student's rollouts: what it holds, refuses, and serves."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_cases import table_to_rollouts
from tiny_models import save_model

from lightopd.cache.index import query
from lightopd.cache.shards import shard_path, write_shard
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import CacheError, ConfigError, LineageError, OutputError
from lightopd.pipelines import rollout, sft
from lightopd.pipelines.caches import join as joining
from lightopd.pipelines.caches.join import join
from lightopd.schemas.cache import ROLLOUTS


def rows_of(path):
    shards = open_cache(path, signals=()).shards
    return [
        row
        for shard in shards
        for row in table_to_rollouts(pq.read_table(shard_path(path / "rollouts", shard)))
    ]


@pytest.fixture
def sources(world):
    return [world.sft / "answers", world.cache]


def test_every_row_is_kept_with_its_key_and_its_writer(sources, tmp_path):
    report = join(tmp_path / "both", sources)
    joined = {row.rollout_id: row for row in rows_of(tmp_path / "both")}
    assert len(joined) == 12 + 24 == report.figures["rollouts"]
    for path, origin in zip(sources, ("teacher", "student"), strict=True):
        for row in rows_of(path):
            found = joined[row.rollout_id]
            assert found.origin == origin
            assert found.prompt_id == row.prompt_id
            np.testing.assert_array_equal(found.response_ids, row.response_ids)
            if origin == "student":
                np.testing.assert_array_equal(found.logprobs, row.logprobs)
            else:
                assert found.logprobs is None
                assert found.entropies is None
                assert row.logprobs is not None


def test_a_joined_cache_verifies_and_tells_whose_rows_have_a_gap(sources, tmp_path):
    join(tmp_path / "both", sources)
    assert verify(tmp_path / "both") == []
    counts = query(
        tmp_path / "both",
        "select origin, count(*) as rows, count(mean_logprob_student) as known from rollouts group by origin",
    ).to_pylist()
    assert sorted((row["origin"], row["rows"], row["known"]) for row in counts) == [
        ("student", 24, 24),
        ("teacher", 12, 0),
    ]


def test_verify_finds_a_row_under_another_writers_name(sources, tmp_path):
    join(tmp_path / "both", sources)
    path = shard_path(tmp_path / "both" / "rollouts", 1)
    table = pq.read_table(path)
    column = table.schema.get_field_index("origin")
    forged = table.set_column(column, ROLLOUTS.field(column), [["student"] * len(table)])
    fingerprint = open_cache(tmp_path / "both").manifest.fingerprint()
    write_shard(path.parent, 1, forged, kind="rollouts", fingerprint=fingerprint)
    said = " ".join(map(str, verify(tmp_path / "both")))
    assert "its rollout_id is not the hash of its content" in said
    assert "it has no logprobs of the sampler" in said


def test_pairs_are_the_first_answer_of_each_to_every_prompt_that_has_both(world, sources, tmp_path):
    few = tmp_path / "few.jsonl"
    lines = (world.root / "prompts.jsonl").read_text().splitlines()[3:]
    few.write_text("\n".join([*lines, '{"prompt": "9*9=", "id": "unanswered"}']))
    asked = {"student": world.sft / "student", "prompts": few, "cache": tmp_path / "few"}
    sets = ["sampling.max_tokens=6", "sampling.n=2", "shard_rollouts=4"]
    rollout.run(load_stage("rollout", [], sets, asked))
    report = join(tmp_path / "pairs", [sources[0], tmp_path / "few"], pairs=True)
    rows = rows_of(tmp_path / "pairs")
    assert sorted((row.prompt_id, row.origin) for row in rows) == sorted(
        (f"p{i}", origin) for i in range(3, 12) for origin in ("student", "teacher")
    )
    assert {row.sample_index for row in rows} == {0}
    assert report.dropped == {
        "teacher's answer without a student's": 3,
        "student's rollout without a teacher's": 1,
        "further answers to a prompt": 10,
    }
    assert verify(tmp_path / "pairs") == []


def test_pairs_of_different_prompts_are_refused(world, sources, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "9*9=", "id": "unanswered"}')
    asked = {"student": world.sft / "student", "prompts": path, "cache": tmp_path / "other"}
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=6"], asked))
    with pytest.raises(CacheError, match="no prompt has both"):
        join(tmp_path / "pairs", [sources[0], tmp_path / "other"], pairs=True)


def test_the_answers_of_one_prompt_lie_in_shards_near_each_other(sources, tmp_path):
    join(tmp_path / "pairs", sources, pairs=True)
    first = [
        table_to_rollouts(pq.read_table(shard_path(tmp_path / "pairs" / "rollouts", i))) for i in range(4)
    ]
    assert [row.prompt_id for row in first[0]] == [row.prompt_id for row in first[1]]
    assert [rows[0].origin for rows in first] == ["teacher", "student"] * 2


def test_a_source_given_twice_adds_nothing(sources, tmp_path):
    report = join(tmp_path / "both", [*sources, sources[1]])
    assert report.figures["rollouts"] == 36
    assert report.dropped == {"in an earlier cache already": 24}


def test_a_killed_join_resumes_and_gives_the_same_bytes(sources, tmp_path, monkeypatch):
    join(tmp_path / "whole", sources)
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "rollouts").glob("part-*")}
    write, calls = joining.write_shard, []

    def killed(*arguments, **settings):
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments, **settings)

    monkeypatch.setattr(joining, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        join(tmp_path / "both", sources)
    join(tmp_path / "both", sources)
    assert {p.name: p.read_bytes() for p in (tmp_path / "both" / "rollouts").glob("part-*")} == wanted
    assert calls[:4] == [0, 1, 2, 2]
    with pytest.raises(OutputError, match="prompts"):
        join(tmp_path / "both", sources, pairs=True)


def test_answers_of_another_teacher_are_refused_and_recorded_when_allowed(world, sources, tmp_path):
    asked = {
        "teacher": save_model(tmp_path / "other", 5),
        "student": world.base,
        "prompts": world.root / "prompts.jsonl",
        "out": tmp_path / "sft",
        "part": "answers",
    }
    sft.run(load_stage("sft", [], ["sampling.max_tokens=6"], asked))
    other = tmp_path / "sft" / "answers"
    with pytest.raises(LineageError, match="the SFT teacher is"):
        join(tmp_path / "both", [other, sources[1]])
    join(tmp_path / "both", [other, sources[1]], allow=["teacher-mismatch"])
    manifest = open_cache(tmp_path / "both").manifest
    assert [override.allowed for override in manifest.overrides] == ["teacher-mismatch"]
    assert verify(tmp_path / "both") == []
    with pytest.raises(CacheError, match="the model that answered"):
        join(tmp_path / "c", [*sources, other], allow=["teacher-mismatch"])


def test_a_prompt_with_other_ids_is_named_with_its_row(world, sources, tmp_path):
    rows = [json.loads(line) for line in (world.root / "prompts.jsonl").read_text().splitlines()]
    rows[4]["prompt"] = "7*7="
    path = tmp_path / "changed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = {"student": world.sft / "student", "prompts": path, "cache": tmp_path / "changed"}
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=6"], asked))
    with pytest.raises(CacheError, match=r"part-00000.parquet row 4: prompt p4 has other ids"):
        join(tmp_path / "both", [sources[0], tmp_path / "changed"])


def test_one_kind_of_cache_is_not_enough(sources, tmp_path):
    with pytest.raises(ConfigError, match="0 and 1 such caches were given"):
        join(tmp_path / "both", sources[1:])
    join(tmp_path / "both", sources)
    with pytest.raises(ConfigError, match="origin mixed"):
        join(tmp_path / "again", [tmp_path / "both", sources[0]])
    with pytest.raises(ConfigError, match="one of the caches to join"):
        join(sources[0], sources)


def test_soda_and_raft_train_from_the_command_line(lightopd, world, sources, tmp_path):
    student, pairs, both = world.sft / "student", tmp_path / "pairs", tmp_path / "both"
    prompts = [json.loads(line) for line in (world.root / "prompts.jsonl").read_text().splitlines()]
    answers = {row.prompt_id: row.response_text for row in rows_of(sources[0])}
    refined = tmp_path / "refined.jsonl"
    refined.write_text("\n".join(json.dumps({**row, "refined": answers[row["id"]]}) for row in prompts))
    assert lightopd("join", pairs, *sources, "--pairs")[0] == 0
    assert lightopd("methods", "check", "soda", pairs)[0] == 5
    score = ["precompute", "--teacher", student, "--cache"]
    assert lightopd(*score, pairs, "--signal", "warmup", "--set", "role=reference", "--top-k", 0)[0] == 0
    assert lightopd("methods", "check", "soda", pairs)[0] == 0
    train = ["train", "--student", student, "--steps", 2, "--set", "batch_sequences=6", "-c"]
    code, out, err = lightopd(*train, "methods/soda", "--cache", pairs, "--out", tmp_path / "soda", "--json")
    assert code == 0, err
    assert 0.6 < json.loads(out)["figures"]["loss"] < 0.8
    assert lightopd("join", both, *sources)[0] == 0
    shown = ["--context", "{{ prompt }}{{ refined }}", "--prompts", refined]
    assert (
        lightopd(*score, both, "--signal", "privileged", "--set", "role=self", "--top-k", 16, *shown)[0] == 0
    )
    code, out, err = lightopd(*train, "methods/raft", "--cache", both, "--out", tmp_path / "raft", "--json")
    assert code == 0, err
    assert json.loads(out)["figures"]["loss"] > 0


def test_objectives_that_read_the_student_at_rollout_are_refused(lightopd, sources, world, tmp_path):
    join(tmp_path / "both", sources)
    train = [
        "train",
        "--student",
        world.sft / "student",
        "--cache",
        tmp_path / "both",
        "--out",
        tmp_path / "o",
    ]
    code, _, err = lightopd(*train, "-c", "methods/truncated_importance")
    assert code == 5
    assert "no log-probabilities of the student at rollout" in err
    code, out, _ = lightopd("methods", "check", "truncated_importance", tmp_path / "both")
    assert code == 5
    assert "no log-probabilities of the student at rollout" in out
