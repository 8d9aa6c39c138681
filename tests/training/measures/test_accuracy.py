"""avg@k during training: equal to an evaluation afterwards, and nothing else changes by a bit."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_models import save_model, write_prompts

from lightopd.config import build_run, load_stage
from lightopd.engines.hf.memory import memory_advice
from lightopd.errors import ConfigError, EngineError, InputError
from lightopd.pipelines import evaluate, rounds, train
from lightopd.schemas.configs import AccuracyConfig, ModelConfig, TrainConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.measures import accuracy
from lightopd.training.measures.accuracy import make_meter
from lightopd.training.measures.metrics_file import append_metrics, read_metrics
from lightopd.training.student.adapters import load_student
from lightopd.training.student.training_mode import prepare_student

SAMPLING = {"n": 3, "max_tokens": 8, "seed": 4}
VERIFIER = "tiny_models:checksum"
CLOCKED = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Seven prompts with answers that nobody trains on."""
    rows = write_prompts(tmp_path_factory.mktemp("prompts") / "all.jsonl", 19).read_text().splitlines()
    path = tmp_path_factory.mktemp("prompts") / "heldout.jsonl"
    path.write_text("\n".join(rows[12:]) + "\n")
    return path


@pytest.fixture
def run(world, prompts, tmp_path):
    """Function that trains into a folder of the test, with a measurement every two steps."""

    def trained(out="out", asked=(), **settings):
        section = {"prompts": {"path": prompts, "verifier": VERIFIER}, "every": 2, "sampling": SAMPLING}
        section |= {"generate_rollouts": 5, **dict(asked or {})}
        plain = {
            "cache": world.cache,
            "student": world.sft / "student",
            "out": tmp_path / out,
            "steps": 5,
            "batch_sequences": 6,
            "checkpoint_every": 3,
            "optimizer": {"lr": 1e-3},
            "accuracy": section if asked is not None else None,
        }
        return train.run(TrainConfig.model_validate(plain | settings))

    return trained


def rows_of(report):
    return read_metrics(Path(report.out) / "metrics.csv")


def column(report):
    return [row["avg_at_k"] for row in rows_of(report)]


def evaluated(report, prompts, out, **model):
    """What `lightopd eval` says of the exported student, in batches of another size."""
    sets = [f"prompts.verifier={VERIFIER}", "engine.generate_rollouts=64"]
    sets += [f"sampling.{name}={value}" for name, value in SAMPLING.items()]
    student = {"path": str(Path(report.out) / "student"), **model}
    asked = {"model": student, "prompts": {"path": str(prompts)}, "out": out}
    return evaluate.run(load_stage("eval", [], sets, asked)).figures["avg_at_k"]


def test_the_last_value_is_that_of_an_evaluation_of_the_exported_student(run, prompts, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    report = run()
    values = column(report)
    assert [math.isnan(value) for value in values] == [True, False, True, False, False]
    assert len({values[1], values[3], values[4]}) == 3, "the student changes, so its answers do"
    assert report.figures["avg_at_k"] == values[4] == evaluated(report, prompts, tmp_path / "eval")
    said = [record.getMessage() for record in caplog.records if "avg@3" in record.getMessage()]
    assert [line.partition(",")[0] for line in said] == [
        f"step {step}: avg@3 {values[step - 1]:.4f}" for step in (2, 4, 5)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"precision": "bf16-mixed"},
        {"adapter": {"rank": 2, "alpha": 4}},
    ],
    ids=["plain", "recomputed", "mixed", "adapter"],
)
def test_training_is_the_same_to_the_last_bit_with_and_without(run, settings):
    asked, silent = run("asked", **settings), run("silent", asked=None, **settings)
    name = "adapter_model.safetensors" if "adapter" in settings else "model.safetensors"
    left, right = (load_file(Path(report.out) / "student" / name) for report in (asked, silent))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    left, right = (
        [{name: value for name, value in row.items() if name not in (*CLOCKED, "avg_at_k")} for row in rows]
        for rows in (rows_of(asked), rows_of(silent))
    )
    assert left == right


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16-mixed"}, {"gradient_checkpointing": True}, {"ema_decay": 0.6}],
    ids=["mixed", "recomputed", "averaged"],
)
def test_answers_are_those_of_the_exported_float32_student_however_it_is_trained(
    run, prompts, tmp_path, settings
):
    report = run(**settings)
    assert report.figures["avg_at_k"] == evaluated(report, prompts, tmp_path / "eval")


def test_an_adapter_answers_as_it_does_when_it_is_merged(run, world, prompts, tmp_path):
    report = run(adapter={"rank": 2, "alpha": 4}, optimizer={"lr": 0.03})
    adapted = {"path": str(world.sft / "student"), "adapter": Path(report.out) / "student"}
    values = column(report)
    assert values[1] != values[4]
    assert values[4] == evaluated(report, prompts, tmp_path / "eval", **adapted)


def test_a_run_that_lost_its_last_steps_makes_the_same_column_again(run, tmp_path):
    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000005")
    again = run("cut")
    assert column(again) == pytest.approx(column(whole), abs=0, nan_ok=True)


def test_a_run_may_go_on_with_or_without_measurements(run):
    run("later", asked=None, steps=3)
    values = column(run("later", steps=4))
    assert [math.isnan(value) for value in values] == [True, True, True, False]
    run("earlier", steps=3)
    report = run("earlier", asked=None, steps=4)
    values = column(report)
    assert [math.isnan(value) for value in values] == [True, False, False, True]
    assert "avg_at_k" not in report.figures, "not measured is not a number"


def test_a_run_that_ends_because_the_cache_is_stale_is_measured_at_its_end(run):
    report = run(
        staleness={"min_overlap": 1.0, "max_chi2": 0.0, "max_log_ratio": 0.0, "stop_when_stale": True},
        asked={"every": 50},
        held_out=4,
    )
    assert report.figures["steps"] < 5
    assert not math.isnan(column(report)[-1])
    assert not math.isnan(rows_of(report)[-1]["held_out"])


def test_the_student_with_the_highest_accuracy_is_exported(run, prompts, tmp_path):
    best = {"metric": "avg_at_k"}
    report = run(asked={"every": 1}, optimizer={"lr": 3e-2}, best=best)
    values = column(report)
    assert max(values) > values[-1]
    assert report.figures["avg_at_k"] == max(values) == evaluated(report, prompts, tmp_path / "eval")
    assert report.figures["exported_step"] == 1 + values.index(max(values))
    with pytest.raises(ValidationError, match=r"nothing measures it; set accuracy\.prompts"):
        run(asked=None, best=best)
    model_settings = {"prompts": "p.jsonl", "out": "out", "teacher": "t", "student": "s"}
    with pytest.raises(ConfigError, match=r"set finetune\.best\.metric to held_out"):
        load_stage("sft", [], ["finetune.best.metric=avg_at_k"], model_settings)


def test_the_time_of_a_measurement_is_not_counted_as_that_of_a_step(run, monkeypatch):
    waited = [0.0]

    def slow(*_):
        waited[0] += 1000
        return 0.5

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + waited[0])
    monkeypatch.setattr("lightopd.training.module.time", clock)
    monkeypatch.setattr(accuracy.AccuracyMeter, "measure", slow)
    report = run(steps=2)
    assert column(report)[-1] == 0.5
    assert sum(row["seconds"] for row in rows_of(report)) < 500


def student_of(world):
    model = load_student(ModelConfig(path=str(world.sft / "student")), FinetuneConfig(), None)
    return prepare_student(model, gradient_checkpointing=True)


def meter_of(world, path, **settings):
    settings = {"sampling": SAMPLING, "prompts": {"path": path, "verifier": VERIFIER}, **settings}
    return make_meter(AccuracyConfig(**settings), ModelConfig(path=str(world.sft / "student")))


def alone(tensor):
    return tensor


def test_no_random_number_is_taken_and_the_student_comes_back_as_it_was(world, prompts):
    student, meter = student_of(world), meter_of(world, prompts)
    before = torch.random.get_rng_state()
    meter.measure(student, 1, (0, 1), alone)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in student.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_shares_of_several_ranks_add_up_to_the_answers_of_one(world, prompts):
    student, meter = student_of(world), meter_of(world, prompts)
    shares = []
    for rank in range(9):  # more ranks than prompts
        meter.measure(student, 1, (rank, 9), lambda share: shares.append(share) or torch.zeros_like(share))
    whole = meter.measure(student, 1, (0, 1), alone)
    assert meter.measure(student, 1, (0, 9), lambda _: sum(shares)) == whole > 0
    assert [int((share != 0).any(dim=1).sum()) for share in shares] == [1] * 7 + [0] * 2


def test_prompts_without_an_answer_are_not_asked(world, prompts, tmp_path):
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    mixed = [{"prompt": "1+1=", "id": "no answer"}, *rows]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert [p.prompt_id for p in meter_of(world, path).rendered.prompts] == [row["id"] for row in rows]


def test_flash_attention_keeps_the_trainers_half_precision(world, prompts, monkeypatch):
    seen = []
    monkeypatch.setattr(accuracy, "generate", lambda *_: seen.append(torch.is_autocast_enabled("cpu")) or [])
    monkeypatch.setattr(accuracy, "accuracy", lambda *_: accuracy_of(0.0))
    student = student_of(world)
    meter = meter_of(world, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        for attention in ("sdpa", "flash_attention_2"):
            student.config._attn_implementation_internal = attention
            meter.measure(student, 1, (7, 8), alone)
    assert seen == [False, True]


def accuracy_of(value):
    from lightopd.training.measures.evaluation import Accuracy

    return Accuracy(avg_at_k=value, pass_at_k=value, standard_error=0.0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "1+1="}, "none of the 1 prompts of accuracy has an answer"),
        ({"prompt": "1+" * 40, "answer": "40"}, "has 80 tokens, the context of .* is 64"),
        (None, "has no prompts"),
    ],
)
def test_prompts_that_give_no_accuracy_are_refused_before_training(run, tmp_path, row, says):
    path = tmp_path / "bad.jsonl"
    path.write_text("" if row is None else json.dumps(row) + "\n")
    with pytest.raises(InputError, match=says):
        run(asked={"prompts": path})
    assert not (tmp_path / "out").exists()


def test_an_answer_that_the_verifier_cannot_use_is_refused_before_training(run, prompts, tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text(prompts.read_text() + json.dumps({"prompt": "2=", "answer": "two"}) + "\n")
    with pytest.raises(InputError, match="last_number needs an answer with a number in it, got 'two'"):
        run(asked={"prompts": {"path": path, "verifier": "last_number"}})
    assert not (tmp_path / "out").exists()


def test_prompts_with_ids_that_the_student_does_not_have_are_refused(prompts, tmp_path):
    student = ModelConfig(path=str(save_model(tmp_path / "narrow", 0, vocabulary=9)))
    with pytest.raises(InputError, match="outside the model's vocabulary of 9"):
        make_meter(AccuracyConfig(prompts=prompts), student)


def test_shares_of_weights_are_refused(run):
    with pytest.raises(ConfigError, match="accuracy during training needs whole weights on a device"):
        run(strategy="fsdp")


def test_a_lack_of_memory_names_the_setting(run, monkeypatch):
    def no_memory(loaded, prompts, sampling, keys, stop_ids, batch_rows, setting, new_reader):
        with memory_advice("generate a batch", setting, batch_rows):
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(accuracy, "generate", no_memory)
    with pytest.raises(EngineError, match=r"set accuracy.generate_rollouts, now 5, to 2 or less"):
        run()


def test_a_run_file_lends_the_prompts_and_the_sampling_of_its_evaluations():
    plain = {
        "out": "o",
        "teacher": "t",
        "student": "s",
        "prompts": "p.jsonl",
        "eval_prompts": "held.jsonl",
        "eval": {"sampling": {"n": 4, "max_tokens": 4096}},
        "train": {"accuracy": {"every": 25, "sampling": {"n": 1}}},
    }
    found = TrainConfig.model_validate(build_run(plain).settings("train")).accuracy
    assert (found.every, str(found.prompts.path)) == (25, "held.jsonl")
    assert (found.sampling.n, found.sampling.max_tokens) == (1, 4096)
    own = {**plain, "train": {"accuracy": {"prompts": "own.jsonl"}}}
    found = TrainConfig.model_validate(build_run(own).settings("train")).accuracy
    assert (str(found.prompts.path), found.sampling.n) == ("own.jsonl", 4)
    with pytest.raises(ConfigError, match=r"section train: accuracy.prompts is missing"):
        build_run({name: value for name, value in plain.items() if name != "eval_prompts"})


def test_rounds_show_their_evaluations_and_may_be_asked_otherwise_later(world, prompts, tmp_path):
    sampling = {"n": 1, "max_tokens": 4}
    plain = {
        "out": str(tmp_path / "run"),
        "teacher": str(world.teacher),
        "student": str(world.sft / "student"),
        "prompts": str(world.root / "prompts.jsonl"),
        "eval_prompts": {"path": str(prompts), "verifier": VERIFIER},
        "rollout": {"sampling": sampling, "shard_rollouts": 4},
        "precompute": {"top_k": 4},
        "eval": {"sampling": {**sampling, "seed": 3}},
        "train": {"steps": 1, "batch_sequences": 4, "accuracy": {"sampling": {"n": 2}}},
        "rounds": {"steps": 2, "prompts_per_round": 4, "eval_every": 2},
    }
    rows = rounds.run(build_run(plain)).rows
    during, after = (
        json.loads((tmp_path / "run" / "round-001" / name).read_text())["figures"]["avg_at_k"]
        for name in ("train/train.report.json", "eval/eval.report.json")
    )
    assert during != after
    assert [row["avg_at_k"] for row in rows] == [None, after]
    assert rounds.run(build_run(plain | {"train": {**plain["train"], "accuracy": None}})).rows == rows


def test_a_column_that_comes_later_is_nan_before_and_one_that_ends_is_nan_after(tmp_path):
    path = tmp_path / "metrics.csv"
    append_metrics(path, {"step": 1, "loss": 0.1})
    append_metrics(path, {"step": 2, "avg_at_k": 0.5, "loss": 0.2})
    append_metrics(path, {"step": 3, "loss": 0.3})
    assert path.read_text() == "step,loss,avg_at_k\n1,0.1,nan\n2,0.2,0.5\n3,0.3,nan\n"


@pytest.mark.slow
def test_two_processes_measure_what_one_does(world, prompts, tmp_path):
    lines = {}
    for name, more in {"one": (), "two": ("--devices", "2", "--strategy", "ddp")}.items():
        out = tmp_path / name
        asked = {"prompts": {"path": str(prompts), "verifier": VERIFIER}, "every": 2, "sampling": SAMPLING}
        sets = ["batch_sequences=6", "optimizer.lr=1e-4", "optimizer.eps=1e-3"]
        sets += [f"accuracy={json.dumps(asked)}"]
        words = ["train", "--cache", world.cache, "--student", world.sft / "student", "--out", out]
        words += ["--steps", 5, *more, *(word for one in sets for word in ("--set", one))]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2] / "support" / "models"),
        }
        lightopd = Path(sys.executable).with_name("lightopd")
        done = subprocess.run(
            [str(lightopd), *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        lines[name] = [row["avg_at_k"] for row in read_metrics(out / "metrics.csv")]
    assert len(set(lines["one"][1::2])) == 2
    assert lines["two"] == pytest.approx(lines["one"], abs=0, nan_ok=True)
