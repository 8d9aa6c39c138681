"""What a stage refuses it refuses before a model is loaded, and with nothing left behind."""

import json
import shutil

import pytest
from run_files import models_of
from tiny_models import CHARACTERS, save_model, tokenizer

from lightopd.config import build, build_run, load_stage
from lightopd.errors import ConfigError, EngineError, InputError, LightopdError, LineageError, OutputError
from lightopd.pipelines import evaluate, precompute, rollout, sft
from lightopd.pipelines import run as pipeline
from lightopd.pipelines.run_checks import check_pipeline
from lightopd.schemas.configs import EvalConfig, TrainConfig

WITH_BASELINE = {"target": "log_ratio", "baseline": "expected"}


def no_engine(*_):
    raise AssertionError("a model was loaded before the refusal")


def evaluation(world, out, *sets, **flags):
    asked = {"model": world.sft / "student", "prompts": world.root / "prompts.jsonl", "out": out, **flags}
    return evaluate.run(load_stage("eval", [], ["sampling.max_tokens=8", *sets], asked), load=no_engine)


def short_teacher(world, tmp_path):
    """The teacher, with a context of 12 tokens."""
    short = shutil.copytree(world.teacher, tmp_path / "short")
    settings = (short / "config.json").read_text()
    shorter = settings.replace('"max_position_embeddings": 64', '"max_position_embeddings": 12')
    (short / "config.json").write_text(shorter)
    return short


@pytest.mark.parametrize("kind", ["vllm", "server"])
def test_kl_to_a_teacher_on_another_engine_is_refused_where_it_is_loaded(kind):
    engine = {"kind": kind, **({"urls": ["http://there:1"]} if kind == "server" else {})}
    asked = {"model": "m", "prompts": "p.jsonl", "out": "o", "engine": engine}
    build(EvalConfig, asked)
    with pytest.raises(ConfigError, match=f"engine.kind is {kind}"):
        build(EvalConfig, {**asked, "teacher": "t"})


def test_evaluation_refuses_a_teacher_that_cannot_read_the_longest_answer(world, tmp_path):
    short = short_teacher(world, tmp_path)
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


def pipeline_of(world, out, **changes):
    plain = models_of(world, out)
    plain |= {"rollout": {"sampling": {"max_tokens": 8}}, "precompute": {"top_k": 4}, "train": {"steps": 1}}
    for section, change in changes.items():
        plain[section] = {**plain[section], **change} if isinstance(plain.get(section), dict) else change
    return build_run(plain)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precompute": {"top_k": 99}}, "top_k is 99, the vocabulary of"),
        (
            {"train": {"objective": {"signal": "other"}}},
            "no signal other .teacher is planned.; set",
        ),
        ({"train": {"objective": {"token_weights": [{"kind": "ratio"}], "signal": "z"}}}, "no signal z"),
        (
            {"precompute": {"top_k": 0}, "train": {"objective": WITH_BASELINE}},
            "planned with 0 top-k entries and 1 or more are needed; set precompute.top_k to 32$",
        ),
        (
            {"precompute": {"top_k": 0}},
            "set precompute.top_k to 32; or .* set train.objective.target to log_ratio$",
        ),
        ({"train": {"devices": 7, "batch_sequences": 4}}, "batch_sequences is 4, which 7 devices cannot"),
        ({"train": {"loggers": ["wandb"]}}, "logger wandb needs"),
        ({"train": {"nodes": 2}}, "nodes is 2, without MASTER_ADDR"),
        ({"teacher": "OTHER"}, "precompute refused: the SFT teacher is"),
        ({"rollout": {"sft_teacher": "none"}}, "--sft-teacher says none"),
        ({"teacher": "SHORT", "allow": ["teacher-mismatch"]}, "prompt and response can have"),
        (
            {"eval_prompts": "heldout.jsonl", "eval": {"teacher": "FOREIGN"}},
            "token ids differ.*correct the ids$",
        ),
    ],
)
def test_a_pipeline_refuses_before_its_first_stage_what_any_stage_would(
    world, tmp_path, monkeypatch, changes, message, dry_run
):
    made = {
        "OTHER": lambda: save_model(tmp_path / "other", 5),
        "SHORT": lambda: short_teacher(world, tmp_path),
    }
    made["FOREIGN"] = lambda: save_model(tmp_path / "foreign", 6, tokens=tokenizer(CHARACTERS[::-1]))
    changes = json.loads(json.dumps(changes))
    for place in (changes, changes.get("eval", {})):
        if place.get("teacher") in made:
            place["teacher"] = str(made[place["teacher"]]())
    monkeypatch.setattr(rollout, "sample", no_engine)
    with pytest.raises(LightopdError, match=message):
        pipeline.run(pipeline_of(world, tmp_path / "run", **changes), dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_models_of_finished_stages_may_be_gone(world, tmp_path):
    config = pipeline_of(world, tmp_path / "run", teacher=str(tmp_path / "gone"))
    check_pipeline(config, lambda name: name in ("rollout", "precompute"))
    with pytest.raises(InputError, match="gone"):
        check_pipeline(config, lambda _: False)


def test_a_disk_too_small_for_students_and_checkpoints_is_refused(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OutputError, match="1e-06 GB free, students and checkpoints alone take"):
        pipeline.run(pipeline_of(world, tmp_path / "run"))
    pipeline.run(pipeline_of(world, tmp_path / "run", train={"adapter": {}}), dry_run=True)
