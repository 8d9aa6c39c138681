"""Each kind of damage is found, named by file and row, and a sound cache has no findings."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import (
    TEACHER,
    VOCABULARY,
    make_cache,
    make_rollout,
    make_scores,
    signal_manifest,
    write_rollouts,
    write_signal,
)

from lightopd.cache.checks.seals import sealed
from lightopd.cache.shards import shard_path, write_shard
from lightopd.cache.tables import rollout_id
from lightopd.cache.verify import verify
from lightopd.errors import CacheError


def findings(path):
    return [str(finding) for finding in verify(path)]


def only(path):
    found = verify(path)
    assert len(found) == 1, [str(finding) for finding in found]
    return found[0]


def cache_with(path, change_rollout=None, change_scores=None, row=1, **signal):
    """A cache of one shard of three rollouts whose `row` is changed, with one signal."""
    rng = np.random.default_rng(3)
    rollouts = [make_rollout(rng, length) for length in (5, 6, 7)]
    settings = {"top_k": 4, "topk_dtype": "float32", **signal}
    smallest = settings.get("min_probability", 0.0)
    scores = [make_scores(rng, item.response_ids, settings["top_k"], smallest) for item in rollouts]
    if change_rollout:
        rollouts[row] = change_rollout(rollouts[row])
    if change_scores:
        scores[row] = change_scores(scores[row])
    rows = [(item.rollout_id, score) for item, score in zip(rollouts, scores, strict=True)]
    write_signal(write_rollouts(path, [rollouts]), "teacher", [rows], **settings)


def with_value(column, place, value):
    def change(record):
        values = getattr(record, column).copy()
        values[place] = value
        return replace(record, **{column: values})

    return change


def renamed(rollout):
    """The rollout with the id that its content asks for."""
    name = rollout_id(rollout.prompt_ids, rollout.response_ids, "student", rollout.sample_index)
    return replace(rollout, rollout_id=name)


@pytest.mark.parametrize(
    "signals",
    [
        {},
        {"teacher": {}},
        {"teacher": {"top_k": 0}, "other": {"top_k": VOCABULARY}, "third": {"topk_dtype": "float32"}},
        {"teacher": {"min_probability": 0.1, "top_k": 9}},
    ],
)
def test_a_sound_cache_has_no_findings(signals, tmp_path):
    make_cache(tmp_path, signals=signals, lengths=[(5, 1, 9), (3, 12), (40,) * 70])
    assert findings(tmp_path) == []


def test_half_rounding_of_a_flat_distribution_is_no_finding(tmp_path):
    flat = np.float32(-np.log(VOCABULARY))

    def change(scores):
        length = len(scores.logprobs)
        return replace(
            scores,
            logprobs=np.full(length, flat),
            topk_counts=np.full(length, VOCABULARY, np.int32),
            topk_ids=np.tile(np.arange(VOCABULARY, dtype=np.int32), length),
            topk_logprobs=np.full(length * VOCABULARY, flat),
            tail_logprobs=np.full(length, -np.inf, np.float32),
        )

    cache_with(tmp_path, change_scores=change, top_k=VOCABULARY, topk_dtype="float16")
    assert findings(tmp_path) == []


def test_a_folder_that_is_not_a_cache_is_an_error(tmp_path):
    with pytest.raises(CacheError, match="is not a cache"):
        verify(tmp_path)


@pytest.mark.parametrize("file", ["lightopd.json", "signals/teacher/signal.json"])
def test_a_broken_or_newer_manifest_is_a_finding(file, tmp_path):
    make_cache(tmp_path)
    path = tmp_path / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 9}))
    assert only(tmp_path).file == file
    assert "schema version 9" in only(tmp_path).what
    path.write_text("{")
    assert "not valid JSON" in only(tmp_path).what


def test_a_flipped_byte_a_truncated_file_and_a_missing_one_are_findings(tmp_path):
    make_cache(tmp_path)
    path = shard_path(tmp_path / "signals" / "teacher", 1)
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    assert (only(tmp_path).file, only(tmp_path).row) == ("signals/teacher/part-00001.parquet", None)
    assert "SHA-256" in only(tmp_path).what
    path.write_bytes(content[:500])
    assert f"it has 500 bytes, its marker says {len(content)}" in only(tmp_path).what
    path.unlink()
    assert "Parquet file is missing" in only(tmp_path).what
    path.with_suffix(".json").unlink()
    assert "the shard is missing" in only(tmp_path).what


def test_a_shard_beyond_the_last_is_a_finding(tmp_path):
    make_cache(tmp_path)
    path = shard_path(tmp_path / "rollouts", 0)
    (tmp_path / "rollouts" / "part-00002.parquet").write_bytes(path.read_bytes())
    assert only(tmp_path).file == "rollouts/part-00002.parquet"


def rewrite(path, index, table, kind, fingerprint):
    write_shard(path, index, table, kind=kind, fingerprint=fingerprint)


def test_metadata_of_another_kind_and_another_schema_are_findings(tmp_path):
    cache, _, _ = make_cache(tmp_path)
    folder, fingerprint = tmp_path / "rollouts", cache.manifest.fingerprint()
    table = pq.read_table(shard_path(folder, 0))
    rewrite(folder, 0, table, "signals/teacher", fingerprint)
    assert "lightopd.kind is 'signals/teacher', not 'rollouts'" in only(tmp_path).what
    rewrite(folder, 0, table.drop_columns(["answer"]), "rollouts", fingerprint)
    assert "answer is missing" in only(tmp_path).what


def test_a_marker_with_wrong_counts_is_a_finding(tmp_path):
    make_cache(tmp_path)
    path = tmp_path / "rollouts" / "part-00000.json"
    plain = json.loads(path.read_text())
    path.write_bytes(sealed({**{name: plain[name] for name in plain if name != "checksum"}, "tokens": 14}))
    assert "it has 3 rows and 15 tokens, its marker says 3 and 14" in only(tmp_path).what


ROLLOUT_DAMAGE = [
    (lambda row: replace(row, rollout_id="0" * 32), "not the hash of its content"),
    (lambda row: replace(row, sample_index=5), "not the hash of its content"),
    (lambda row: renamed(with_value("response_ids", 2, VOCABULARY)(row)), "response_ids has 48 at place 2"),
    (lambda row: renamed(with_value("response_ids", 2, -1)(row)), "response_ids has -1 at place 2"),
    (lambda row: renamed(with_value("prompt_ids", 0, 1000)(row)), "prompt_ids has 1000 at place 0"),
    (lambda row: renamed(with_value("response_ids", 5, 7)(row)), "it stopped, but its last id is none of"),
    (lambda row: replace(row, truncated=True), "truncated and finish_reason disagree"),
    (lambda row: replace(row, origin="teacher"), "its origin is not 'student'"),
    (with_value("logprobs", 3, 0.01), "logprobs has 0.0[0-9]* at place 3, which is not a log-probability"),
    (with_value("entropies", 3, -0.5), "entropies has -0.5 at place 3"),
    (with_value("turns", 2, -1), "turns has -1 at place 2"),
    (with_value("turns", 0, 9), "turns has [01] at place 1, which is negative or goes back"),
]


@pytest.mark.parametrize(("change", "what"), ROLLOUT_DAMAGE)
def test_damage_in_a_rollout_is_named_by_row(change, what, tmp_path):
    cache_with(tmp_path, change_rollout=change)
    found = [finding for finding in verify(tmp_path) if finding.file == "rollouts/part-00000.parquet"]
    assert [finding.row for finding in found] == [1]
    assert re.search(what, found[0].what), found[0].what


def test_a_rollout_id_that_occurs_twice_is_a_finding_also_across_shards(tmp_path):
    rng = np.random.default_rng(0)
    first, second = make_rollout(rng, 4), make_rollout(rng, 5)
    write_rollouts(tmp_path, [[first, second], [second]])
    found = only(tmp_path)
    assert (found.file, found.row) == ("rollouts/part-00001.parquet", 0)
    assert "occurs in an earlier row" in found.what


def test_an_empty_response_and_missing_logprobs_are_findings(tmp_path):
    rng = np.random.default_rng(0)
    bare = [replace(make_rollout(rng, length), logprobs=None) for length in (4, 0)]
    write_rollouts(tmp_path, [bare])
    assert sorted(finding.what for finding in verify(tmp_path)) == [
        "it has no logprobs of the sampler (2 such places)",
        "its response is empty",
    ]


SCORE_DAMAGE = [
    (with_value("logprobs", 2, 0.01), "logprobs has 0.0"),
    (with_value("tail_logprobs", 2, 0.1), "tail_logprobs has 0.1"),
    (with_value("tail_logprobs", 2, -9.0), "at place 2, which is the sum of top-k and tail"),
    (with_value("topk_logprobs", 9, -0.001), "at position 2 its top-k is not sorted"),
    (
        lambda scores: with_value("topk_logprobs", 9, scores.topk_logprobs[8] + 1e-4)(scores),
        "at position 2 its top-k is not sorted",
    ),
    (with_value("topk_ids", 8, VOCABULARY), "topk_ids has 48 at place 8, which is outside the vocabulary"),
    (with_value("topk_ids", 8, -1), "topk_ids has -1 at place 8"),
    (
        lambda scores: with_value("topk_ids", 9, scores.topk_ids[8])(scores),
        "position 2 a token id occurs twice",
    ),
    (with_value("logprobs", 2, -1e-5), "at position 2 the sampled token"),
]


@pytest.mark.parametrize(("change", "what"), SCORE_DAMAGE)
def test_damage_in_a_signal_is_named_by_row_and_place(change, what, tmp_path):
    cache_with(tmp_path, change_scores=change)
    found = verify(tmp_path)
    assert {(finding.file, finding.row) for finding in found} == {("signals/teacher/part-00000.parquet", 1)}
    assert any(what in finding.what for finding in found), [str(finding) for finding in found]


def test_a_sampled_token_that_disagrees_with_its_topk_entry_is_a_finding(tmp_path):
    cache_with(tmp_path, change_scores=with_value("logprobs", 0, -30.0), top_k=VOCABULARY)
    assert (
        "at position 0 the sampled token's log-probability is not that of its top-k entry"
        in only(tmp_path).what
    )


def test_a_short_topk_is_a_finding_unless_a_smallest_probability_was_asked_for(tmp_path):
    def change(scores):
        rng = np.random.default_rng(1)
        return make_scores(rng, np.zeros(len(scores.logprobs), np.int32), 4, 0.2)

    cache_with(tmp_path / "a", change_scores=change)
    assert any("where top_k asks for 4" in line for line in findings(tmp_path / "a"))
    cache_with(tmp_path / "b", change_scores=change, min_probability=0.2)
    assert not any("where top_k asks for 4" in line for line in findings(tmp_path / "b"))


def test_float_noise_above_zero_is_no_finding(tmp_path):
    cache_with(tmp_path, change_rollout=with_value("logprobs", 0, 1e-6))
    assert findings(tmp_path) == []


def test_many_broken_places_are_one_finding_with_their_number(tmp_path):
    cache_with(tmp_path, change_rollout=lambda row: replace(row, logprobs=-row.logprobs))
    assert "(6 such places)" in only(tmp_path).what


def test_a_row_beyond_the_first_block_is_named_by_its_row_in_the_file(tmp_path):
    rng = np.random.default_rng(0)
    rollouts = [make_rollout(rng, 3) for _ in range(200)]
    rollouts[150] = with_value("logprobs", 1, 2.0)(rollouts[150])
    write_rollouts(tmp_path, [rollouts])
    assert only(tmp_path).row == 150
    assert "at place 1" in only(tmp_path).what


def test_a_signal_in_another_order_is_a_finding(tmp_path):
    rng = np.random.default_rng(0)
    rollouts = [make_rollout(rng, 4) for _ in range(3)]
    rows = [(row.rollout_id, make_scores(rng, row.response_ids, 4)) for row in rollouts]
    write_signal(write_rollouts(tmp_path, [rollouts]), "teacher", [[rows[0], rows[2], rows[1]]])
    assert only(tmp_path).row == 1
    assert "not that of the rollouts' row" in only(tmp_path).what


def test_entries_that_the_counts_do_not_cover_are_a_finding(tmp_path):
    cache, _, _ = make_cache(tmp_path, lengths=[(4,)])
    folder = tmp_path / "signals" / "teacher"
    table = pq.read_table(shard_path(folder, 0))
    counts = pa.array([[4, 4, 4, 5]], table.schema.field("topk_counts").type)
    table = table.set_column(2, table.schema.field("topk_counts"), counts)
    write_shard(
        folder, 0, table, kind="signals/teacher", fingerprint=cache.signals["teacher"].manifest.fingerprint()
    )
    assert any("topk_ids is not as long as topk_counts say" in line for line in findings(tmp_path))


def test_a_signal_of_other_rollouts_and_of_another_teacher_are_findings(tmp_path):
    cache, _, _ = make_cache(
        tmp_path, signals={"teacher": {"model": TEACHER.model_copy(update={"identity": "x"})}}
    )
    assert only(tmp_path).file == "signals/teacher/signal.json"
    assert "scores, and no override says so" in only(tmp_path).what
    override = {"stage": "precompute", "allowed": "teacher-mismatch", "found": "x"}
    excused = signal_manifest(
        "teacher",
        cache.manifest,
        model=TEACHER.model_copy(update={"identity": "x"}),
        overrides=[override],
    ).model_copy(update={"rollouts": "0" * 64})
    (tmp_path / "signals" / "teacher" / "signal.json").write_text(excused.model_dump_json())
    lines = findings(tmp_path)
    assert any("it scored rollouts 000000000000" in line for line in lines)
    assert not any("fine-tuning teacher" in line for line in lines)
