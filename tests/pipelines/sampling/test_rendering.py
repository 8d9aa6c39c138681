"""A template that writes the date, and options of a template: what was rendered once stays as it was."""

import json
import os
from datetime import datetime

import pyarrow.parquet as pq
import pytest
from tiny_models import TEMPLATE, save_model, tokenizer, write_prompts

from lightopd.cache.reader import read_columns
from lightopd.cache.store import open_cache
from lightopd.config import build_run, load_stage
from lightopd.errors import LineageError, OutputError
from lightopd.pipelines import precompute, rollout
from lightopd.pipelines import run as pipeline
from lightopd.prompts import render

DATED = "{{ strftime_now('%d') }}=" + TEMPLATE
FIRST, NEXT = datetime(2026, 3, 11, 23, 59), datetime(2026, 3, 12, 0, 1)
SHORT = ["sampling.max_tokens=6", "shard_rollouts=3"]


@pytest.fixture
def day(monkeypatch):
    """Function that says what the clock shows."""
    return lambda now: monkeypatch.setattr(render, "template_clock", lambda _: now)


@pytest.fixture
def dated(tmp_path):
    """Folder with a student and a teacher whose template writes the day, and prompts."""
    for seed, name in enumerate(("student", "teacher")):
        save_model(tmp_path / name, seed, tokens=tokenizer(template=DATED))
    write_prompts(tmp_path / "prompts.jsonl", 6)
    return tmp_path


def sample(root):
    flags = {"student": root / "student", "prompts": root / "prompts.jsonl", "cache": root / "cache"}
    return rollout.run(load_stage("rollout", [], SHORT, {**flags, "sft_teacher": str(root / "teacher")}))


def days_in(cache):
    """The day in the prompts of a cache, as it was written."""
    opened = open_cache(cache)
    tables = [read_columns(opened, shard, ["prompt_ids"]) for shard in opened.shards]
    return {tuple(ids[:3]) for table in tables for ids in table["prompt_ids"].to_pylist()}


def prompt_of_day(number):
    ids = tokenizer(template=DATED).convert_tokens_to_ids
    return tuple(ids(character) for character in f"{number}=")


def test_rollouts_resume_on_the_next_day_with_the_prompts_that_are_there(dated, day):
    day(FIRST)
    sample(dated)
    shard = dated / "cache" / "rollouts" / "part-00001.parquet"
    whole = shard.read_bytes()
    for file in (shard, shard.with_suffix(".json")):
        file.unlink()
    day(NEXT)
    sample(dated)
    assert shard.read_bytes() == whole
    assert days_in(dated / "cache") == {prompt_of_day(11)}


def test_a_context_is_shown_the_day_of_the_rollouts(dated, day):
    day(FIRST)
    sample(dated)
    day(NEXT)
    context = {"template": "{{ prompt }}", "prompts": str(dated / "prompts.jsonl")}
    flags = {"cache": dated / "cache", "teacher": dated / "teacher", "top_k": 4, "context": context}
    precompute.run(load_stage("precompute", [], [], flags))
    shown = pq.read_table(dated / "cache" / "signals" / "teacher" / "contexts.parquet")
    assert {tuple(ids[:3]) for ids in shown["prompt_ids"].to_pylist()} == {prompt_of_day(11)}


@pytest.mark.slow
def test_a_pipeline_goes_on_the_next_day(dated, day):
    plain = {"out": str(dated / "run"), "teacher": str(dated / "teacher"), "student": str(dated / "student")}
    plain["prompts"] = str(dated / "prompts.jsonl")
    plain["rollout"] = {"sampling": {"max_tokens": 6}, "sft_teacher": str(dated / "teacher")}
    plain |= {"precompute": {"top_k": 4}, "train": {"steps": 1, "batch_sequences": 2}}
    day(FIRST)
    pipeline.run(build_run(plain))
    day(NEXT)
    pipeline.run(build_run({**plain, "train": {"steps": 2, "batch_sequences": 2}}))
    assert days_in(dated / "run" / "cache") == {prompt_of_day(11)}


def test_a_cache_that_did_not_record_its_day_has_that_of_its_file_or_is_refused_with_the_cause(dated, day):
    day(FIRST)
    sample(dated)
    path = dated / "cache" / "lightopd.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "rendered_at"}
    path.write_text(json.dumps(manifest))
    os.utime(path, (FIRST.timestamp(), FIRST.timestamp()))
    day(NEXT)
    sample(dated)
    os.utime(path, (NEXT.timestamp(), NEXT.timestamp()))
    with pytest.raises(OutputError, match="the chat template writes the date"):
        sample(dated)


@pytest.mark.parametrize(
    ("row", "sets", "words"),
    [
        (
            {},
            ['prompts.template_options={"enable_thinking": false}'],
            "template_options is {} in the",
        ),
        ({}, ["prompts.render=plain"], "render is chat in the student's training and plain here"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, [], "rows have chat_template_kwargs"),
    ],
)
def test_an_option_of_the_template_that_the_student_was_not_taught_under_is_refused(
    world, tmp_path, row, sets, words
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "1+1=", **row}) + "\n")
    flags = {"student": world.sft / "student", "prompts": prompts, "cache": tmp_path / "cache"}
    with pytest.raises(LineageError, match=words):
        rollout.run(load_stage("rollout", [], [*SHORT, *sets], flags))
    assert not (tmp_path / "cache").exists()
    allowed = {**flags, "allow": ["template-mismatch"]}
    report = rollout.run(load_stage("rollout", [], [*SHORT, *sets], allowed))
    assert any("overridden: template-mismatch in rollout" in note for note in report.notes)
