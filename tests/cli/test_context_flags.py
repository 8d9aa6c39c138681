"""A scoring model that is shown another prompt, from the command line: made, trained on, refused."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from lightopd.cache.manifests import signal_folder
from lightopd.cache.shards import shard_path
from lightopd.cache.store import open_cache

SHORT = "{{ prompt }}{{ solution }},"


@pytest.fixture
def solved(world, tmp_path):
    """The rollouts' prompts with a solution beside each."""
    rows = [json.loads(line) for line in (world.root / "prompts.jsonl").read_text().splitlines()]
    path = tmp_path / "solved.jsonl"
    path.write_text("".join(json.dumps({**row, "solution": f"{i}+{i}"}) + "\n" for i, row in enumerate(rows)))
    return path


@pytest.fixture
def cache(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    return tmp_path / "cache"


def logprobs(cache, signal):
    tables = [pq.read_table(shard_path(signal_folder(cache, signal), index)) for index in (0, 1)]
    return np.concatenate([row for table in tables for row in table.column("logprobs").to_pylist()])


def test_flags_settings_and_a_file_make_one_signal(lightopd, world, cache, solved, tmp_path):
    plain = ["precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4]
    file = tmp_path / "shown.yaml"
    file.write_text(yaml.safe_dump({"context": {"template": SHORT, "prompts": str(solved)}}))
    ways = {
        "by_flags": ["--context", SHORT, "--prompts", solved],
        "by_settings": ["--set", f"context.template='{SHORT}'", "--set", f"context.prompts.path={solved}"],
        "by_file": ["-c", file],
    }
    for signal, words in ways.items():
        code, out, err = lightopd(*plain, "--signal", signal, *words)
        assert code == 0, err
        assert "gap_nats" in out
    signals = open_cache(cache).signals
    contexts = [signals[name].manifest.context for name in ways]
    assert contexts[0]["template"] == SHORT
    assert contexts[1] == contexts[2] == contexts[0]
    made = [logprobs(cache, name) for name in ways]
    assert np.array_equal(made[1], made[0])
    assert np.array_equal(made[2], made[0])
    assert np.abs(made[0] - logprobs(cache, "teacher")).mean() > 0.1
    lightopd("push", cache, f"file://{tmp_path}/bucket")
    for place in (cache, f"file://{tmp_path}/bucket"):
        code, out, err = lightopd("verify", place, "--rescore", 2, "--signal", "by_flags")
        assert (code, f"verify: {place}\n" in out) == (0, True), err


def test_a_student_that_teaches_itself_is_trained_against_what_it_was_shown(
    lightopd,
    world,
    cache,
    solved,
    tmp_path,
):
    student = world.sft / "student"
    shown = [
        "--context",
        SHORT,
        "--prompts",
        solved,
        "--signal",
        "privileged",
        "--set",
        "role=self",
        "--top-k",
        4,
    ]
    code, out, err = lightopd("precompute", "--cache", cache, "--teacher", student, *shown, "--dry-run")
    assert (code, "response_tokens" in out) == (0, True), err
    assert not signal_folder(cache, "privileged").exists()
    assert lightopd("methods", "check", "opsd", cache)[0] == 5
    assert lightopd("precompute", "--cache", cache, "--teacher", student, *shown)[0] == 0
    assert lightopd("methods", "check", "opsd", cache)[0] == 0
    words = ["-c", "methods/opsd", "--cache", cache, "--student", student, "--out", tmp_path / "out"]
    code, out, err = lightopd("train", *words, "--steps", 1, "--set", "batch_sequences=4")
    assert code == 0, err
    assert "loss" in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompts", "SOLVED"], 2, "context.template is missing"),
        (["--context", SHORT], 2, "context.prompts is missing"),
        (["--context", "privilege", "--prompts", "SOLVED"], 2, "no template 'privilege'"),
        (["--context", "privileged", "--prompts", "SOLVED"], 3, "holds 64; shorten the template"),
        (["--context", "{{ prompt }}{{ hint }}", "--prompts", "SOLVED"], 3, "hint"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line(
    lightopd,
    world,
    cache,
    solved,
    words,
    code,
    message,
):
    words = [solved if word == "SOLVED" else word for word in words]
    asked = ["precompute", "--cache", cache, "--teacher", world.teacher, "--signal", "privileged"]
    found, out, err = lightopd(*asked, "--top-k", 4, *words)
    assert (found, out) == (code, "")
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert not signal_folder(cache, "privileged").exists()
