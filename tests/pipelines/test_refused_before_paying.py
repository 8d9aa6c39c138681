"""What a stage refuses it refuses before a model is loaded, and with nothing left behind."""

import shutil

import pytest
from tiny_models import save_model

from lightopd.config import build, load_stage
from lightopd.errors import ConfigError, EngineError, InputError, LineageError, OutputError
from lightopd.pipelines import evaluate, precompute, rollout, sft
from lightopd.schemas.configs import EvalConfig, TrainConfig


def no_engine(*_):
    raise AssertionError("a model was loaded before the refusal")


def evaluation(world, out, *sets, **flags):
    asked = {"model": world.sft / "student", "prompts": world.root / "prompts.jsonl", "out": out, **flags}
    return evaluate.run(load_stage("eval", [], ["sampling.max_tokens=8", *sets], asked), load=no_engine)


@pytest.mark.parametrize("kind", ["vllm", "server"])
def test_kl_to_a_teacher_on_another_engine_is_refused_where_it_is_loaded(kind):
    engine = {"kind": kind, **({"urls": ["http://there:1"]} if kind == "server" else {})}
    asked = {"model": "m", "prompts": "p.jsonl", "out": "o", "engine": engine}
    build(EvalConfig, asked)
    with pytest.raises(ConfigError, match=f"engine.kind is {kind}"):
        build(EvalConfig, {**asked, "teacher": "t"})


def test_evaluation_refuses_a_teacher_of_another_width_before_it_samples(world, tmp_path):
    wider = save_model(tmp_path / "wider", 3, vocabulary=32)
    with pytest.raises(InputError, match=r"24 outputs, .* has 32"):
        evaluation(world, tmp_path / "eval", teacher=wider)
    assert not (tmp_path / "eval").exists()


def test_evaluation_refuses_a_teacher_that_cannot_read_the_longest_answer(world, tmp_path):
    short = shutil.copytree(world.teacher, tmp_path / "short")
    settings = (short / "config.json").read_text()
    (short / "config.json").write_text(
        settings.replace('"max_position_embeddings": 64', '"max_position_embeddings": 12')
    )
    with pytest.raises(InputError, match=r"can have \d+ tokens .* is 12; set sampling.max_tokens to \d+ or"):
        evaluation(world, tmp_path / "eval", "sampling.max_tokens=20", teacher=short)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"loggers": ["wandb"]}, "logger wandb needs the package wandb"),
        ({"nodes": 2}, "nodes is 2, without MASTER_ADDR"),
    ],
)
def test_sft_refuses_a_training_that_cannot_work_before_a_teacher_answers(world, tmp_path, finetune, message):
    asked = {"teacher": world.teacher, "student": world.base, "prompts": world.root / "prompts.jsonl"}
    config = load_stage("sft", [], [], {**asked, "out": tmp_path / "s", "finetune": finetune})
    with pytest.raises(ConfigError, match=message):
        sft.run(config, load=no_engine)
    assert not (tmp_path / "s").exists()
    with pytest.raises(AssertionError):  # answers alone need no training
        sft.run(config.model_copy(update={"part": "answers"}), load=no_engine)


@pytest.mark.parametrize(
    ("changes", "message"), [({"adapter": {}, "held_out": 9}, "whole matrices"), ({}, "held_out is 0")]
)
def test_a_jump_without_what_it_needs_is_refused_where_it_is_loaded(changes, message):
    plain = {"cache": "c", "student": "s", "out": "o", "objective": {"jump": {}}}
    build(TrainConfig, {**plain, "held_out": 9})
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {**plain, **changes})


@pytest.mark.parametrize("stage", ["sft", "rollout", "precompute", "eval"])
def test_a_folder_of_other_settings_is_refused_before_a_model_is_loaded(world, tmp_path, stage):
    prompts = world.root / "prompts.jsonl"
    shutil.copytree(world.sft / "answers", tmp_path / "sft" / "answers")
    shutil.copytree(world.cache, tmp_path / "cache")
    shutil.copytree(world.cache, tmp_path / "eval" / "answers")
    student, teacher = world.sft / "student", world.teacher
    config, run = {
        "sft": ({"teacher": teacher, "student": world.base, "out": tmp_path / "sft"}, sft.run),
        "rollout": ({"student": student, "cache": tmp_path / "cache"}, rollout.run),
        "precompute": ({"teacher": teacher, "cache": tmp_path / "cache", "top_k": 5}, precompute.run),
        "eval": ({"model": student, "out": tmp_path / "eval"}, evaluate.run),
    }[stage]
    asked = config if stage == "precompute" else {**config, "prompts": prompts}
    sets = [] if stage == "precompute" else ["sampling.max_tokens=11"]
    with pytest.raises(OutputError, match=r"top_k: is|max_tokens"):
        run(load_stage(stage, [], sets, asked), load=no_engine)


def test_a_teacher_that_did_not_teach_is_refused_before_it_is_loaded(world, tmp_path):
    other = save_model(tmp_path / "other", 5)
    asked = {"cache": world.cache, "teacher": other, "signal": "second", "top_k": 4}
    with pytest.raises(LineageError, match="precompute refused"):
        precompute.run(load_stage("precompute", [], [], asked), load=no_engine)


@pytest.mark.parametrize(
    "changed",
    ['"answer": "1"', '"answer": "2", "domain": "sums"', '"answer": "2", "verifier": "last_number"'],
)
def test_whatever_of_a_prompt_decides_a_row_makes_another_cache(world, tmp_path, changed):
    prompts = tmp_path / "p.jsonl"
    asked = {"student": world.base, "prompts": prompts, "cache": tmp_path / "cache"}
    prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=4"], asked))
    sets = ["sampling.max_tokens=4"]
    if "verifier" in changed:
        changed, sets = '"answer": "2"', [*sets, "prompts.verifier=last_number"]
    prompts.write_text('{"prompt": "1+1=", ' + changed + "}\n")
    with pytest.raises(OutputError, match="prompts: is"):
        rollout.run(load_stage("rollout", [], sets, asked), load=no_engine)


def test_a_failed_start_leaves_nothing_that_blocks_the_next(world, tmp_path):
    def broken(*_):
        raise EngineError("this model cannot be run so")

    asked = {"student": world.base, "prompts": world.root / "prompts.jsonl", "cache": tmp_path / "cache"}
    short = ["sampling.max_tokens=4", "prompts.limit=2"]
    with pytest.raises(EngineError):
        rollout.run(load_stage("rollout", [], ["sampling.max_tokens=5"], asked), load=broken)
    rollout.run(load_stage("rollout", [], short, asked))
    with pytest.raises(OutputError, match="max_tokens"):
        rollout.run(load_stage("rollout", [], ["sampling.max_tokens=5", "prompts.limit=2"], asked))
