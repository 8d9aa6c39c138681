"""The stages over tiny real models: what they write, refuse, resume, and say."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import table_to_rollouts, table_to_scores
from tiny_models import CHARACTERS, save_model, tokenizer

from lightopd.cache.checks.seals import sealed, unsealed
from lightopd.cache.index import query
from lightopd.cache.shards import write_shard
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.errors import ConfigError, InputError, LineageError, OutputError
from lightopd.models.load import load_model
from lightopd.pipelines import evaluate, precompute, rollout, sft, train
from lightopd.pipelines.caches.rescore import rescore
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import SignalManifest, StudentLineage


def run_rollout(world, cache, *sets, **flags):
    asked = {
        "student": world.sft / "student",
        "prompts": world.root / "prompts.jsonl",
        "cache": cache,
        **flags,
    }
    return rollout.run(
        load_stage("rollout", [], ["sampling.max_tokens=10", "shard_rollouts=6", *sets], asked)
    )


def run_precompute(cache, teacher, *sets, **flags):
    asked = {"cache": cache, "teacher": teacher, "top_k": 4, **flags}
    return precompute.run(load_stage("precompute", [], sets, asked))


def run_train(world, out, *sets, **flags):
    asked = {"cache": world.cache, "student": world.sft / "student", "out": out, "steps": 2, **flags}
    return train.run(load_stage("train", [], ["batch_sequences=6", *sets], asked))


def rows_of(folder):
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in table_to_rollouts(pq.read_table(path))
    ]


def test_cached_logprobs_are_those_of_a_direct_forward_pass(world):
    """Both the student's at rollout and the teacher's, at every response token, the end token included."""
    cache = open_cache(world.cache)
    for shard in cache.shards:
        rollouts = table_to_rollouts(pq.read_table(world.cache / "rollouts" / f"part-{shard:05d}.parquet"))
        scores = table_to_scores(pq.read_table(world.cache / "signals/teacher" / f"part-{shard:05d}.parquet"))
        for name, cached in (("student", rollouts), ("teacher", scores)):
            folder = world.sft / "student" if name == "student" else world.teacher
            model = load_model(ModelConfig(path=str(folder)), "cpu")
            for row, values in zip(rollouts, cached, strict=True):
                ids = torch.tensor(np.concatenate([row.prompt_ids, row.response_ids])[None], dtype=torch.long)
                with torch.no_grad():
                    direct = model(input_ids=ids).logits[0].double().log_softmax(-1)
                positions = range(len(row.prompt_ids) - 1, ids.shape[1] - 1)
                wanted = [float(direct[p, ids[0, p + 1]]) for p in positions]
                np.testing.assert_allclose(values.logprobs, wanted, atol=1e-5)


def test_responses_end_with_the_drawn_end_token_or_are_marked_truncated(world):
    for row in rows_of(world.cache / "rollouts"):
        assert (row.response_ids[-1] == 1) == (row.finish_reason == "stop")
        assert row.truncated == (row.finish_reason == "length")
        assert 1 not in row.response_ids[:-1]


def test_ids_on_disk_are_the_ids_that_are_trained_on(world):
    from lightopd.pipelines.shared.sequences import read_sequences

    stored = [
        s.response_ids.tolist()
        for i in open_cache(world.cache).shards
        for s in read_sequences(open_cache(world.cache), i)[1]
    ]
    assert stored == [row.response_ids.tolist() for row in rows_of(world.cache / "rollouts")]


def test_every_stage_leaves_its_resolved_config_and_its_report(world, tmp_path):
    run_train(world, tmp_path / "train")
    for folder, stage in [
        (world.sft, "sft"),
        (world.cache, "rollout"),
        (world.cache / "signals" / "teacher", "precompute"),
        (tmp_path / "train", "train"),
    ]:
        load_stage(stage, [str(folder / f"{stage}.yaml")], [], {})
        assert json.loads((folder / f"{stage}.report.json").read_text())["stage"] == stage


def test_a_finished_cache_verifies_and_rescores(world):
    assert verify(world.cache) == []
    report, agrees = rescore(world.cache, "teacher", 5)
    assert agrees
    assert report.figures["rollouts"] == 5


def test_rescoring_finds_a_cache_whose_numbers_are_not_its_teachers(world, tmp_path):
    """A cache scored by other weights that claims the teacher's name: only re-scoring can see it."""
    other = save_model(tmp_path / "other", 5)
    shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "signals")
    run_precompute(tmp_path / "cache", other, allow=["teacher-mismatch"])
    manifest = tmp_path / "cache/signals/teacher/signal.json"
    honest = json.loads((world.cache / "signals/teacher/signal.json").read_text())
    forged = {**unsealed(json.loads(manifest.read_text())), "model": honest["model"]}
    manifest.write_bytes(sealed(forged))
    fingerprint = SignalManifest(**forged).fingerprint()
    for index, file in enumerate(sorted(manifest.parent.glob("part-*.parquet"))):
        kind, table = "signals/teacher", pq.read_table(file)
        write_shard(manifest.parent, index, table, kind=kind, fingerprint=fingerprint)
    report, agrees = rescore(tmp_path / "cache", "teacher", 5, teacher=str(world.teacher))
    assert not agrees
    assert "nats apart" in report.notes[0]


def test_running_again_does_nothing_and_changes_no_byte(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("part-*")}

    def no_engine(*_):
        raise AssertionError("a model was loaded although everything is done")

    asked = {"cache": tmp_path / "cache", "teacher": world.teacher, "top_k": 4}
    precompute.run(load_stage("precompute", [], [], asked), load=no_engine)
    asked = {
        "student": world.sft / "student",
        "prompts": world.root / "prompts.jsonl",
        "cache": tmp_path / "cache",
    }
    sets = ["sampling.max_tokens=10", "shard_rollouts=6", "sampling.n=2"]
    rollout.run(load_stage("rollout", [], sets, asked), load=no_engine)
    assert before == {p: p.read_bytes() for p in (tmp_path / "cache").rglob("part-*")}


def test_rollouts_do_not_depend_on_shards_or_batches(world, tmp_path):
    run_rollout(world, tmp_path / "a", "sampling.n=2", "engine.generate_rollouts=1")
    run_rollout(world, tmp_path / "b", "sampling.n=2", "shard_rollouts=24")
    ids = [
        sorted((r.rollout_id, r.response_ids.tolist()) for r in rows_of(tmp_path / x / "rollouts"))
        for x in "ab"
    ]
    assert ids[0] == ids[1]


def test_other_settings_in_the_same_folder_are_refused_by_name(world, tmp_path):
    run_rollout(world, tmp_path / "cache")
    with pytest.raises(OutputError, match=r"sampling\.temperature: is 1\.0, would be 0\.5"):
        run_rollout(world, tmp_path / "cache", "sampling.temperature=0.5")


def test_sft_records_its_teacher_in_the_student_folder(world):
    lineage = StudentLineage.model_validate_json(
        (world.sft / "student" / "lightopd_student.json").read_text()
    )
    assert lineage.sft.proof == "recorded"
    assert lineage.sft.teacher.source == str(world.teacher)
    assert open_cache(world.cache).manifest.sft == lineage.sft


def test_another_teacher_is_refused_with_the_theorems_and_recorded_when_allowed(world, tmp_path):
    other = save_model(tmp_path / "other", 5)
    shutil.copytree(world.cache, tmp_path / "cache")
    with pytest.raises(LineageError, match=r"2604\.13010.*3\.8"):
        run_precompute(tmp_path / "cache", other, signal="other")
    report = run_precompute(tmp_path / "cache", other, signal="other", allow=["teacher-mismatch"])
    assert any("overridden: teacher-mismatch" in note for note in report.notes)
    manifest = open_cache(tmp_path / "cache").signals["other"].manifest
    assert [override.allowed for override in manifest.overrides] == ["teacher-mismatch"]


def test_a_renamed_or_moved_folder_of_the_same_teacher_is_accepted(world, tmp_path):
    shutil.copytree(world.teacher, tmp_path / "renamed")
    shutil.copytree(world.cache, tmp_path / "cache")
    run_precompute(tmp_path / "cache", tmp_path / "renamed", signal="again")
    first, second = ((tmp_path / "cache/signals" / n / "part-00000.parquet") for n in ("teacher", "again"))
    columns = ["rollout_id", "logprobs", "topk_ids", "topk_logprobs", "tail_logprobs"]
    assert pq.read_table(first, columns=columns) == pq.read_table(second, columns=columns)


def test_a_teacher_with_another_vocabulary_of_equal_size_is_refused(world, tmp_path):
    shuffled = save_model(tmp_path / "teacher", 0, tokens=tokenizer(CHARACTERS[::-1]))
    shutil.copytree(world.cache, tmp_path / "cache")
    with pytest.raises(LineageError, match="token ids differ"):
        run_precompute(tmp_path / "cache", shuffled, signal="x")


def test_a_teacher_with_another_template_is_refused(world, tmp_path):
    templated = save_model(
        tmp_path / "teacher", 0, tokens=tokenizer(template="[{{ messages[0]['content'] }}]")
    )
    shutil.copytree(world.cache, tmp_path / "cache")
    with pytest.raises(LineageError, match="template-mismatch"):
        run_precompute(tmp_path / "cache", templated, signal="x")


def test_a_teacher_with_another_end_token_is_refused(world, tmp_path):
    shutil.copytree(world.teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, 2]}))
    shutil.copytree(world.cache, tmp_path / "cache")
    with pytest.raises(LineageError, match="special-ids-mismatch"):
        run_precompute(tmp_path / "cache", tmp_path / "teacher", signal="x")


def test_training_another_student_is_refused(world, tmp_path):
    with pytest.raises(LineageError, match="student-mismatch"):
        run_train(world, tmp_path / "out", student=save_model(tmp_path / "other", 5, layers=1))


def test_an_undeclared_teacher_is_refused_and_a_declared_one_is_marked_not_proven(world, tmp_path):
    student = save_model(tmp_path / "student", 3, layers=1)
    run_rollout(world, tmp_path / "a", student=student)
    with pytest.raises(LineageError, match="--sft-teacher"):
        run_precompute(tmp_path / "a", world.teacher)
    report = run_rollout(world, tmp_path / "b", student=student, sft_teacher=str(world.teacher))
    assert any("declared, not proven" in note for note in report.notes)
    run_precompute(tmp_path / "b", world.teacher)
    assert open_cache(tmp_path / "b").manifest.sft.proof == "declared"


def test_the_trained_student_knows_its_cache_and_its_base(world, tmp_path):
    run_train(world, tmp_path / "out")
    lineage = StudentLineage.model_validate_json((tmp_path / "out/student/lightopd_student.json").read_text())
    base = StudentLineage.model_validate_json((world.sft / "student" / "lightopd_student.json").read_text())
    assert lineage.made_by == "train"
    assert lineage.base.identity == base.student.identity
    assert lineage.cache


def test_a_second_signal_is_added_without_touching_the_first(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    before = {
        p: p.read_bytes()
        for p in (tmp_path / "cache").rglob("*")
        if p.is_file() and p.name not in (".lightopd.lock", "index.duckdb")
    }
    run_precompute(tmp_path / "cache", world.sft / "student", signal="reference", role="reference", top_k=0)
    assert all(path.read_bytes() == content for path, content in before.items())
    rows = query(
        tmp_path / "cache", "select max(abs(gap)) as gap from tokens where signal = 'reference'"
    ).to_pylist()
    assert rows[0]["gap"] < 1e-5


def test_rollouts_can_be_scored_into_another_folder(world, tmp_path):
    report = run_precompute(tmp_path / "cache", world.teacher, rollouts=world.cache)
    assert verify(tmp_path / "cache") == []
    assert report.figures["rollouts"] == 24


def test_dry_runs_write_nothing_and_name_tokens_bytes_and_hours(world, tmp_path):
    asked = {"cache": world.cache, "teacher": world.teacher, "signal": "x", "top_k": 4}
    given = precompute.run(load_stage("precompute", [], [], asked), dry_run=True, tokens_per_s=1000.0)
    tokens = open_cache(world.cache).num_tokens
    assert given.figures["hours"] == pytest.approx(tokens / 1000 / 3600)
    assert given.figures["bytes"] == tokens * (12 + 4 * 6)
    measured = precompute.run(load_stage("precompute", [], [], asked), dry_run=True)
    assert measured.figures["tokens_per_s"] > 0
    assert not (world.cache / "signals" / "x").exists()


def test_a_dry_run_of_training_says_what_memory_goes_to_and_whether_it_fits(world, tmp_path, lightopd):
    asked = ["--cache", world.cache, "--student", world.sft / "student", "--out", tmp_path / "t"]
    code, out, _ = lightopd("train", *asked, "--dry-run")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "estimated memory: " in line]
    assert re.search(
        r"weights [\d.e-]+, gradients [\d.e-]+, moments .*, activations .*, kernel .*, cache ", line
    )
    assert re.search(r"which fits into the [\d.]+ GiB of free memory$", line)
    assert not (tmp_path / "t").exists()


def test_a_top_k_above_the_vocabulary_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match=r"the vocabulary of .* has 24 tokens"):
        run_precompute(world.cache, world.teacher, top_k=25, signal="x")


def test_a_prompt_longer_than_the_context_is_refused_by_row(world, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "1+1=", "id": "a"}\n' + json.dumps({"prompt": "1+" * 40, "id": "b"}) + "\n")
    with pytest.raises(InputError, match=r"long.jsonl, row 2 \(id b\) has 80 tokens"):
        run_rollout(world, tmp_path / "cache", prompts=path)
    assert not (tmp_path / "cache").exists()


def test_evaluation_measures_kl_and_a_model_has_none_to_itself(world, tmp_path):
    asked = {"model": world.teacher, "teacher": world.teacher, "prompts": world.root / "prompts.jsonl"}
    report = evaluate.run(
        load_stage("eval", [], ["sampling.max_tokens=8"], {**asked, "out": tmp_path / "eval"})
    )
    assert abs(report.figures["reverse_kl_nats"]) < 1e-6
    assert report.figures["avg_at_k"] == 0.0


def test_sft_halves_run_alone(world, tmp_path):
    base = {
        "teacher": world.teacher,
        "student": world.base,
        "prompts": world.root / "prompts.jsonl",
        "out": tmp_path / "s",
    }
    short = ["sampling.max_tokens=6", "finetune.steps=1", "finetune.batch_sequences=4"]
    sft.run(load_stage("sft", [], short, {**base, "part": "answers"}))
    assert not (tmp_path / "s" / "student").exists()
    sft.run(load_stage("sft", [], short, {**base, "part": "finetune"}))
    assert (tmp_path / "s" / "student" / "lightopd_student.json").is_file()
