"""Fine-tuning by forward KL on what the teacher holds likely along its own answers."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from cache_cases import table_to_rollouts
from tiny_models import save_model

from lightopd.cache.store import content_id, open_cache
from lightopd.config import load_stage
from lightopd.errors import ConfigError, TrainingError
from lightopd.models.load import load_model
from lightopd.pipelines import sft
from lightopd.pipelines.train import run as train
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import StudentLineage
from lightopd.training.measures.metrics_file import read_metrics

VOCABULARY = 24


def tuned(world, out, *sets, top_k=VOCABULARY, **flags):
    asked = {"teacher": world.teacher, "student": world.base, "prompts": world.root / "prompts.jsonl"}
    short = ["sampling.max_tokens=10", "shard_rollouts=12", "finetune.steps=2", "finetune.batch_sequences=12"]
    return sft.run(load_stage("sft", [], [*short, f"top_k={top_k}", *sets], asked | {"out": out, **flags}))


def logprobs(folder, row):
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    with torch.no_grad():
        logits = load_model(ModelConfig(path=str(folder)), "cpu").double()(ids).logits[0]
    return logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)


def test_the_first_loss_is_the_mean_kl_of_both_models_over_the_teachers_answers(world, tmp_path):
    tuned(world, tmp_path / "run", "finetune.optimizer.warmup_steps=0")
    path = tmp_path / "run" / "answers" / "rollouts" / "part-00000.parquet"
    rows = table_to_rollouts(pq.read_table(path))
    assert len(rows) == 12
    of_rows = []
    for row in rows:
        teacher, student = logprobs(world.teacher, row), logprobs(world.base, row)
        of_rows.append((teacher.exp() * (teacher - student)).sum(-1).mean())
    first = read_metrics(tmp_path / "run" / "metrics.csv")[0]
    assert first["loss"] == pytest.approx(float(torch.stack(of_rows).mean()), abs=2e-3)  # top-k as float16


def test_the_student_is_one_that_the_teacher_taught_so_that_its_rollouts_are_scored_and_trained_on(
    world, tmp_path, lightopd
):
    tuned(world, tmp_path / "run", top_k=4)
    lineage = StudentLineage.model_validate_json(
        (tmp_path / "run" / "student" / "lightopd_student.json").read_text()
    )
    answers = open_cache(tmp_path / "run" / "answers", signals=["teacher"])
    assert lineage.sft.proof == "recorded"
    assert lineage.sft.data == content_id(answers, ())
    cache, student = tmp_path / "cache", tmp_path / "run" / "student"
    prompts = world.root / "prompts.jsonl"
    short = ("--set", "sampling.max_tokens=6")
    assert lightopd("rollout", "--student", student, "--prompts", prompts, "--cache", cache, *short)[0] == 0
    assert lightopd("precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4)[0] == 0
    asked = {"cache": cache, "student": student, "out": tmp_path / "train", "steps": 1}
    assert train(load_stage("train", [], ["batch_sequences=6"], asked)).figures["steps"] == 1


def test_a_finished_run_scores_and_trains_nothing_again_and_another_loss_is_refused(world, tmp_path):
    first = tuned(world, tmp_path / "run", top_k=4)

    def no_engine(*_):
        raise AssertionError("a model was loaded although everything is there")

    asked = {"teacher": world.teacher, "student": world.base, "prompts": world.root / "prompts.jsonl"}
    short = ["sampling.max_tokens=10", "shard_rollouts=12", "finetune.steps=2", "finetune.batch_sequences=12"]
    again = load_stage("sft", [], [*short, "top_k=4"], asked | {"out": tmp_path / "run"})
    assert sft.run(again, load=no_engine).figures["finetune_loss"] == first.figures["finetune_loss"]
    with pytest.raises(TrainingError, match=r"objective\.terms"):
        sft.run(again.model_copy(update={"top_k": None}))
    signals = json.loads((tmp_path / "run" / "answers" / "signals" / "teacher" / "signal.json").read_text())
    assert signals["role"] == "self"


def test_more_tokens_than_there_are_are_refused_before_the_teacher_answers(world, tmp_path):
    with pytest.raises(ConfigError, match=r"sft.top_k is 25, the vocabulary of .* has 24"):
        tuned(world, tmp_path / "run", top_k=VOCABULARY + 1)
    assert not (tmp_path / "run" / "answers").exists()


def test_a_student_without_outputs_for_the_teachers_tokens_is_refused(world, tmp_path):
    wide = save_model(tmp_path / "wide", 3, vocabulary=32)
    with pytest.raises(ConfigError, match=r"which has 32 outputs, and .* has 24; leave top_k out"):
        tuned(world, tmp_path / "run", top_k=4, teacher=wide)
