"""Ways round a refusal that must stay closed, and folders that must not be spoilt by a refused run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_models import CHARACTERS, save_model, tokenizer

from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.config import load_run, load_stage
from lightopd.errors import CacheError, ConfigError, InputError, LineageError, OutputError, TrainingError
from lightopd.pipelines import evaluate, precompute, rollout, sft, train
from lightopd.pipelines import run as pipeline
from lightopd.pipelines.shared.gap import Gap, verdict
from lightopd.pipelines.shared.metrics import COLUMNS, FIGURES
from lightopd.schemas.configs import SamplingConfig


def run_train(world, cache, out, *sets, **flags):
    asked = {"cache": cache, "student": world.sft / "student", "out": out, "steps": 1, **flags}
    return train.run(load_stage("train", [], ["batch_sequences=6", *sets], asked))


def test_another_teacher_cannot_come_in_as_a_reference(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    other = save_model(tmp_path / "other", 5)
    asked = {"cache": tmp_path / "cache", "teacher": other, "top_k": 4, "signal": "sly", "role": "reference"}
    precompute.run(load_stage("precompute", [], [], asked))
    with pytest.raises(LineageError, match="teacher-mismatch"):
        run_train(world, tmp_path / "cache", tmp_path / "out", "objective.signal=sly")
    allowed = {"allow": ["teacher-mismatch"]}
    report = run_train(world, tmp_path / "cache", tmp_path / "out", "objective.signal=sly", **allowed)
    assert any("overridden: teacher-mismatch in train" in note for note in report.notes)


def test_fine_tuning_takes_only_answers_of_the_teacher_that_is_named(world, tmp_path):
    shutil.copytree(world.sft, tmp_path / "sft")
    before = (tmp_path / "sft" / "sft.yaml").read_bytes()
    other = save_model(tmp_path / "other", 5)
    asked = {"teacher": other, "student": world.base, "prompts": world.root / "prompts.jsonl"}
    sets = ["sampling.max_tokens=10", "shard_rollouts=6", "part=finetune"]
    with pytest.raises(OutputError, match=r"sampler\.identity"):
        sft.run(load_stage("sft", [], sets, {**asked, "out": tmp_path / "sft"}))
    assert (tmp_path / "sft" / "sft.yaml").read_bytes() == before


def test_a_refused_run_leaves_the_config_of_the_finished_one(world, tmp_path):
    run_train(world, world.cache, tmp_path / "out", "optimizer.lr=1e-5")
    before = (tmp_path / "out" / "train.yaml").read_bytes()
    with pytest.raises(TrainingError):
        run_train(world, world.cache, tmp_path / "out", "optimizer.lr=1e-4", steps=2)
    assert (tmp_path / "out" / "train.yaml").read_bytes() == before


def test_a_stage_runs_while_another_signal_is_unfinished(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    asked = {"cache": tmp_path / "cache", "teacher": world.teacher, "top_k": 4}
    precompute.run(load_stage("precompute", [], [], {**asked, "signal": "second"}))
    (tmp_path / "cache/signals/second/part-00002.json").unlink()
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(tmp_path / "cache")
    precompute.run(load_stage("precompute", [], [], {**asked, "signal": "third"}))
    run_train(world, tmp_path / "cache", tmp_path / "out")


def test_the_pipeline_resumes_after_it_was_stopped_in_the_middle_of_scoring(world, tmp_path):
    file = tmp_path / "run.yaml"
    settings = {
        "out": str(tmp_path / "run"),
        "teacher": str(world.teacher),
        "student": str(world.sft / "student"),
        "prompts": str(world.root / "prompts.jsonl"),
        "rollout": {"sampling": {"max_tokens": 8}, "shard_rollouts": 4},
        "precompute": {"top_k": 4},
        "train": {"steps": 1, "batch_sequences": 6},
    }
    file.write_text(yaml.safe_dump(settings))
    pipeline.run(load_run([str(file)], [], {}))
    folder = tmp_path / "run/cache/signals/teacher"
    whole = {path.name: path.read_bytes() for path in folder.glob("part-*")}
    shutil.rmtree(tmp_path / "run" / "train")
    for name in ("part-00001.json", "part-00002.json", "part-00002.parquet"):
        (folder / name).unlink()
    pipeline.run(load_run([str(file)], [], {}))
    assert {path.name: path.read_bytes() for path in folder.glob("part-*")} == whole
    assert (tmp_path / "run/train/student/lightopd_student.json").is_file()


def test_kl_between_models_of_other_tokens_is_refused(world, tmp_path):
    shuffled = save_model(tmp_path / "shuffled", 0, tokens=tokenizer(CHARACTERS[::-1]))
    asked = {"model": world.teacher, "teacher": shuffled, "prompts": world.root / "prompts.jsonl"}
    with pytest.raises(LineageError, match="token ids differ"):
        evaluate.run(load_stage("eval", [], ["sampling.max_tokens=4"], {**asked, "out": tmp_path / "eval"}))


def test_two_prompts_of_equal_tokens_are_refused_by_row(world, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "id": "a"}\n{"prompt": "1+1=", "id": "b"}\n')
    asked = {"student": world.base, "prompts": tmp_path / "p.jsonl", "cache": tmp_path / "cache"}
    with pytest.raises(InputError, match=r"row 2 \(id b\) has the tokens of .*p.jsonl, row 1 \(id a\)"):
        rollout.run(load_stage("rollout", [], [], asked))


def test_a_corrected_answer_makes_another_cache(world, tmp_path):
    asked = {"student": world.base, "prompts": tmp_path / "p.jsonl", "cache": tmp_path / "cache"}
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "3"}\n')
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=4"], asked))
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    with pytest.raises(OutputError, match="prompts: is"):
        rollout.run(load_stage("rollout", [], ["sampling.max_tokens=4"], asked))


def test_a_flag_changes_the_path_and_keeps_what_the_file_says_beside_it(tmp_path):
    file = tmp_path / "r.yaml"
    prompts = {"path": "a.jsonl", "render": "plain", "limit": 5}
    student = {"path": "s", "dtype": "bfloat16", "revision": "abc"}
    file.write_text(yaml.safe_dump({"prompts": prompts, "student": student, "cache": "c"}))
    config = load_stage("rollout", [str(file)], [], {"prompts": "b.jsonl", "student": "t"})
    assert (str(config.prompts.path), config.prompts.render, config.prompts.limit) == ("b.jsonl", "plain", 5)
    assert (config.student.path, config.student.dtype, config.student.revision) == ("t", "bfloat16", None)


@pytest.mark.parametrize(
    ("gap", "temperature", "words"),
    [
        (0.01, 1.0, "small"),
        (0.1, 1.0, "moderate"),
        (0.5, 1.0, "large"),
        (0.01, 0.8, "is no KL"),
        (None, 1.0, "unknown"),
    ],
)
def test_the_verdict_on_a_gap_names_its_size_only_where_it_is_a_divergence(gap, temperature, words):
    found = None if gap is None else Gap(gap, 0.001, gap)
    assert words in verdict(found, SamplingConfig(temperature=temperature))


def test_an_adapter_that_was_trained_samples_is_evaluated_and_is_trained_again(world, tmp_path):
    adapter = {"adapter": {"rank": 2}}
    run_train(world, world.cache, tmp_path / "one", **adapter)
    student = world.sft / "student"
    given = {"path": str(student), "adapter": str(tmp_path / "one" / "student")}
    short = ["sampling.max_tokens=10", "shard_rollouts=6"]
    prompts, cache = world.root / "prompts.jsonl", tmp_path / "cache"
    asked = {"student": given["adapter"], "prompts": prompts, "cache": cache}
    rollout.run(load_stage("rollout", [], short, asked))
    manifest = open_cache(cache).manifest
    assert manifest.sampler.adapter is not None
    assert manifest.sft.proof == "recorded"
    precompute.run(load_stage("precompute", [], [], {"cache": cache, "teacher": world.teacher, "top_k": 4}))
    asked = {"model": given["adapter"], "prompts": prompts, "out": tmp_path / "eval"}
    asked["sampling"] = {"max_tokens": 10}
    assert evaluate.run(load_stage("eval", [], [], asked)).figures["rollouts"] == 12
    with pytest.raises(LineageError, match="the weights are equal, the adapter is not"):
        run_train(world, cache, tmp_path / "plain", **adapter)
    run_train(world, cache, tmp_path / "two", student=given, **adapter)
    lineage = json.loads((tmp_path / "two" / "student" / "lightopd_student.json").read_text())
    assert lineage["base"]["identity"] == manifest.sampler.identity
    assert lineage["student"]["weights"] == lineage["base"]["weights"]
    merged = run_train(world, cache, tmp_path / "dense", student=given)
    assert merged.figures["steps"] == 1


def test_the_pipeline_evaluates_the_adapter_on_the_student_it_began_with(tmp_path):
    settings = {
        "out": tmp_path,
        "teacher": "t",
        "student": "s",
        "prompts": "p.jsonl",
        "eval_prompts": "e.jsonl",
    }
    adapted = load_run([], [], {**settings, "train": {"adapter": {"rank": 2}}})
    model = adapted.settings("eval_after")["model"]
    assert (model["path"], model["adapter"]) == ("s", tmp_path / "train" / "student")
    merged = load_run([], [], {**settings, "train": {"adapter": {"merge": True}}})
    assert merged.settings("eval_after")["model"] == {"path": str(tmp_path / "train" / "student")}


def test_fine_tuning_leaves_no_adapter_without_the_tokenizer_it_learnt():
    asked = {"teacher": "t", "student": "s", "prompts": "p.jsonl", "out": "o"}
    with pytest.raises(ConfigError, match=r"set finetune\.adapter\.merge to true"):
        load_stage("sft", [], ["finetune.adapter.rank=2"], asked)


def undeclared(world, tmp_path):
    """Rollouts of a student that no sft of ours made."""
    asked = {"student": world.base, "prompts": world.root / "prompts.jsonl", "cache": tmp_path / "cache"}
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=4", "prompts.limit=6"], asked))
    return {"cache": tmp_path / "cache", "teacher": world.teacher, "top_k": 4}


@pytest.mark.parametrize("said", ["the teacher", "none"])
def test_who_taught_the_student_can_be_said_after_sampling_and_stays_with_what_is_made(world, tmp_path, said):
    asked = undeclared(world, tmp_path)
    with pytest.raises(LineageError, match=r"--sft-teacher none .the rollouts stay."):
        precompute.run(load_stage("precompute", [], [], asked))
    teacher = "none" if said == "none" else str(world.teacher)
    report = precompute.run(load_stage("precompute", [], [], {**asked, "sft_teacher": teacher}))
    assert not any("overridden" in note for note in report.notes)
    signal = open_cache(tmp_path / "cache").signals["teacher"].manifest
    assert signal.sft_declared.proof == ("none" if said == "none" else "declared")
    assert verify(tmp_path / "cache") == []
    train.run(
        load_stage(
            "train",
            [],
            ["batch_sequences=6"],
            {"cache": tmp_path / "cache", "student": world.base, "out": tmp_path / "t", "steps": 1},
        )
    )
    made = json.loads((tmp_path / "t" / "student" / "lightopd_student.json").read_text())
    assert made["sft"]["proof"] == signal.sft_declared.proof
    assert made["overrides"] == []


def test_several_teachers_are_each_said_to_be_the_one_of_their_signal(world, tmp_path):
    asked = undeclared(world, tmp_path)
    other = save_model(tmp_path / "other", 5)
    for name, teacher in (("math", world.teacher), ("code", other)):
        flags = {**asked, "teacher": teacher, "signal": name, "sft_teacher": str(teacher)}
        precompute.run(load_stage("precompute", [], [], flags))
    signals = open_cache(tmp_path / "cache").signals
    assert [signal.manifest.overrides for signal in signals.values()] == [(), ()]


def test_the_documented_recipe_of_a_teacher_per_domain_trains_without_an_override(world, tmp_path, lightopd):
    cache, prompts, student = tmp_path / "cache", tmp_path / "prompts.jsonl", world.base
    rows = [{"prompt": f"{i}+1=", "answer": "1", "domain": ("math", "code")[i % 2]} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = ["--set", "prompts.verifier=tiny_models:checksum", "--n", 2, "--max-tokens", 6]
    commands = [["rollout", "--student", student, "--prompts", prompts, "--cache", cache, *graded]]
    for name, teacher in (("math", world.teacher), ("code", save_model(tmp_path / "other", 5))):
        said = ["--signal", name, "--sft-teacher", teacher, "--top-k", 4]
        commands.append(["precompute", "--cache", cache, "--teacher", teacher, *said])
    text = (Path(__file__).parents[2] / "docs" / "stages" / "precompute.md").read_text()
    (documented,) = re.findall(r"lightopd (train .*?by_domain.*?)\n\n", text, re.DOTALL)
    places = {"RUN/cache": cache, "STUDENT": student, "RUN/train": tmp_path / "train"}
    words = shlex.split(documented.replace("\\\n", " "))
    commands.append([*(places.get(word, word) for word in words), "--steps", 1, "--batch", 2])
    for command in commands:
        code, _, err = lightopd(*command)
        assert code == 0, err
    made = json.loads((tmp_path / "train" / "student" / "lightopd_student.json").read_text())
    assert made["overrides"] == []


def test_a_declared_teacher_that_contradicts_the_record_is_refused(world, tmp_path):
    other = save_model(tmp_path / "other", 5)
    asked = {"student": world.sft / "student", "prompts": world.root / "prompts.jsonl"}
    for said in (str(other), "none"):
        flags = {**asked, "cache": tmp_path / "cache", "sft_teacher": said}
        with pytest.raises(LineageError, match="--sft-teacher says"):
            rollout.run(load_stage("rollout", [], [], flags))
    flags = {"cache": world.cache, "teacher": other, "signal": "x", "top_k": 4, "sft_teacher": str(other)}
    with pytest.raises(LineageError, match="is recorded"):
        precompute.run(load_stage("precompute", [], [], flags))


def test_every_number_that_is_printed_has_its_line_on_the_page_of_metrics(world, tmp_path):
    run_train(world, world.cache, tmp_path / "t", "held_out=3", steps=3)
    lines = (tmp_path / "t" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    assert {*columns} <= {*COLUMNS}, "pipelines/shared/metrics.py"
    reports = [tmp_path / "t", world.cache, world.cache / "signals" / "teacher"]
    for folder in reports:
        figures = json.loads(next(folder.glob("*.report.json")).read_text())["figures"]
        assert {*figures} <= {*COLUMNS, *FIGURES}, folder
    trained = json.loads((tmp_path / "t" / "train.report.json").read_text())["figures"]["tokens"]
    assert trained == sum(int(float(line.split(",")[columns.index("tokens")])) for line in lines[1:])
