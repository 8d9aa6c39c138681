"""Tokenizer, student and teacher may have three widths: 24 tokens, 26 and 40 outputs."""

import json

import numpy as np
import pytest
from tiny_models import save_model, write_prompts

from lightopd.cache.reader import largest_id, read_columns, rows_beyond
from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_stage
from lightopd.engines.kinds import load_engine
from lightopd.errors import InputError
from lightopd.pipelines import precompute, rollout, sft, train
from lightopd.pipelines.caches.rescore import rescore
from lightopd.pipelines.shared.sequences import read_sequences
from lightopd.schemas.configs import HfEngine, ModelConfig

TERMS = [{"target": {"kind": "divergence", "divergence": "reverse_kl", "support": "tail"}}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("widths")
    student = save_model(root / "student", 0, vocabulary=26)
    teacher = save_model(root / "teacher", 1, vocabulary=40)
    prompts = write_prompts(root / "prompts.jsonl", 6)
    asked = {"student": student, "prompts": prompts, "cache": root / "cache", "sft_teacher": str(teacher)}
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=8", "sampling.n=2"], asked))
    asked = {"cache": root / "cache", "teacher": teacher, "top_k": 6}
    report = precompute.run(load_stage("precompute", [], ["topk_dtype=float32"], asked))
    return root, report


def test_ids_that_only_the_teacher_has_are_left_to_the_tail_and_named(made):
    root, report = made
    assert any(
        "has 40 outputs, the student 26: ids from 26 on are left to the tail" in n for n in report.notes
    )
    cache = open_cache(root / "cache")
    assert cache.signals["teacher"].manifest.id_limit == 26
    assert max(largest_id(cache, shard) for shard in cache.shards) < 26
    counts = read_columns(cache, 0, ["topk_counts"], "teacher")["topk_counts"].to_pylist()
    assert min(min(row) for row in counts) < 6


def test_the_tail_is_exact(made):
    root, _ = made
    cache = open_cache(root / "cache")
    engine = load_engine(HfEngine(device="cpu"), ModelConfig(path=str(root / "teacher")))
    table = read_columns(cache, 0, ["topk_counts", "topk_ids", "tail_logprobs"], "teacher").to_pylist()
    for row, whole in zip(table, engine.score(read_sequences(cache, 0)[1], 40), strict=True):
        start = 0
        for place, count in enumerate(row["topk_counts"]):
            ids = row["topk_ids"][start : start + count]
            start += count
            own = slice(40 * place, 40 * place + 40)
            outside = ~np.isin(whole.topk_ids[own], ids)
            mass = np.exp(whole.topk_logprobs[own][outside].astype(np.float64)).sum()
            assert np.exp(row["tail_logprobs"][place]) == pytest.approx(mass, abs=1e-5)


def test_rescoring_leaves_the_same_ids_to_the_tail(made):
    root, _ = made
    report, agrees = rescore(root / "cache", "teacher", 6)
    assert agrees, report.notes


def test_the_cache_is_whole_and_trains_on_the_top_k(made):
    root, _ = made
    assert not verify(root / "cache")
    asked = {"student": root / "student", "cache": root / "cache", "out": root / "out"}
    train.run(
        load_stage("train", [], ["steps=1", "batch_sequences=6"], asked | {"objective": {"terms": TERMS}})
    )


def tune(root, student, teacher, **flags):
    asked = {"student": student, "teacher": teacher, "prompts": write_prompts(root / "prompts.jsonl", 6)}
    asked |= {"out": root / "sft", "finetune": {"steps": 1, "batch_sequences": 2}}
    sets = ["sampling.max_tokens=8", "sampling.n=3"]
    return sft.run(load_stage("sft", [], sets, asked), **flags)


def test_answers_with_an_id_beyond_the_students_are_left_out_of_fine_tuning_and_named(tmp_path):
    student = save_model(tmp_path / "student", 0, vocabulary=24)
    report = tune(tmp_path, student, save_model(tmp_path / "teacher", 1, vocabulary=40))
    answers = open_cache(tmp_path / "sft" / "answers")
    beyond = sum(len(rows_beyond(answers, shard, 24)) for shard in answers.shards)
    assert 0 < beyond < 18
    assert any(f"{beyond} rollouts have a token id of 24 or more" in note for note in report.notes)


def test_a_student_without_an_output_for_a_token_is_refused_before_a_teacher_answers(tmp_path):
    student = save_model(tmp_path / "student", 0, vocabulary=20)
    with pytest.raises(InputError, match=r"has 20 outputs, and .* is id 20; .*resize_token_embeddings\(21\)"):
        tune(tmp_path, student, save_model(tmp_path / "teacher", 1), load=None)
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("tunes", [False, True], ids=["hub student", "with sft"])
def test_a_pipeline_over_three_widths_runs_to_a_measured_student(tmp_path, lightopd, tunes):
    """21 tokens, 26 outputs of the student, 40 of the teacher: scored, trained, compared by KL."""
    student = save_model(tmp_path / "student", 0, vocabulary=26)
    teacher = save_model(tmp_path / "teacher", 1, vocabulary=40)
    prompts, small = write_prompts(tmp_path / "prompts.jsonl", 8), {"max_tokens": 8}
    settings = {
        "out": str(tmp_path / "run"),
        "teacher": str(teacher),
        "student": str(student),
        "prompts": str(prompts),
        "eval_prompts": str(prompts),
        "eval": {"teacher": str(teacher), "sampling": small},
        "rollout": {"sampling": small, **({} if tunes else {"sft_teacher": str(teacher)})},
        "precompute": {"top_k": 6},
        "train": {"steps": 1, "batch_sequences": 4, "objective": {"terms": TERMS}},
    }
    if tunes:
        finetune = {"steps": 1, "batch_sequences": 2}
        settings["sft"] = {"sampling": {**small, "n": 3}, "finetune": finetune}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    for _ in range(2):  # the second time nothing is left to do
        code, _, err = lightopd("run", "-c", tmp_path / "run.yaml")
        assert code == 0, err
    report = json.loads((tmp_path / "run" / "eval_after" / "eval.report.json").read_text())["figures"]
    assert 0 < report["outside_mass"] < 1
    assert report["reverse_kl_nats"] > 0
    assert lightopd("verify", tmp_path / "run" / "cache", "--rescore", 4)[0] == 0
