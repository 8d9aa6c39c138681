"""Replicas on one box: one command, several engine processes, one progress and one report."""

import json
import os
import re
import shutil
import signal

import pytest
from crowd import begin, children_of, is_gone, shards_of, stopped_in_the_middle, until

from lightopd.config import load_stage
from lightopd.errors import ConfigError
from lightopd.pipelines.workers import replicas


def precompute(world, cache, *more):
    return ["precompute", "--cache", cache, "--teacher", world.teacher, "--top-k", 4, "--replicas", 2, *more]


def without_signal(world, path):
    shutil.copytree(world.cache, path)
    shutil.rmtree(path / "signals")
    return path


@pytest.mark.slow
def test_two_replicas_make_the_rollouts_and_the_signal_of_one_process(world, tmp_path):
    cache = tmp_path / "cache"
    asked = ["--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl", "--n", 2]
    sets = ["--set", "sampling.max_tokens=10", "--set", "shard_rollouts=6"]
    process = begin("rollout", *asked, *sets, "--cache", cache, "--replicas", 2, "--json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    report = json.loads(out)
    assert (report["stage"], report["figures"]["replicas"], report["figures"]["rollouts"]) == (
        "rollout",
        2,
        24,
    )
    assert "rollout: 4/4 shards" in err
    assert shards_of(cache / "rollouts") == shards_of(world.cache / "rollouts")
    process = begin(*precompute(world, cache))
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err.count("precompute: 4/4 shards") == 1
    assert shards_of(cache / "signals/teacher") == shards_of(world.cache / "signals/teacher")
    assert not (cache / ".lightopd.claims").exists()
    assert (
        json.loads((cache / "signals/teacher/precompute.report.json").read_text())["figures"]["replicas"] == 2
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_replicas_end_with_the_command_however_it_ends(world, tmp_path, number, code):
    cache = without_signal(world, tmp_path / "cache")
    process = begin(*precompute(world, cache, "--set", "sharing.lease_s=3600"))
    until(lambda: len(children_of(process.pid)) == 2)
    children = children_of(process.pid)
    until(lambda: (cache / ".lightopd.claims").exists())
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    until(lambda: all(map(is_gone, children)))


@pytest.mark.slow
def test_what_all_replicas_fail_of_is_told_once_with_its_exit_code(world, tmp_path):
    cache = without_signal(world, tmp_path / "cache")
    process = begin(
        *precompute(world, cache, "--set", "max_noise_nats=1e-30", "--set", "engine.batch_tokens=40")
    )
    _, err = process.communicate()
    assert process.returncode == 6, err
    last = err.splitlines()[-1]
    assert last.startswith("error: all 2 replicas failed, 2 of them alike; replica 1: ")
    assert last.endswith("(exit code 6)")
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_others_finish_what_a_killed_replica_began(world, tmp_path):
    cache = without_signal(world, tmp_path / "cache")
    process = begin(*precompute(world, cache, "--json"))
    os.kill(stopped_in_the_middle(cache, "signals/teacher"), signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    (killed,) = re.findall(r"replica ([12]) of 2: killed \(SIGKILL\)", err)
    notes = json.loads(out)["notes"]
    assert any(f"replica {killed} failed: killed (SIGKILL)" in note for note in notes)
    assert shards_of(cache / "signals/teacher") == shards_of(world.cache / "signals/teacher")


def config(*sets, **sharing):
    asked = {"student": "S", "prompts": "P", "cache": "C", "sharing": sharing}
    return load_stage("rollout", [], list(sets), asked)


def test_each_replica_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    two = config("engine.kind=vllm", "engine.tensor_parallel_size=2", replicas=2)
    named = [each["CUDA_VISIBLE_DEVICES"] for each in replicas._environments(two)]
    assert named == ["3,5", "6,7"]
    with pytest.raises(ConfigError, match="5 replicas of 1 GPU need 5, and 4 are visible"):
        replicas._environments(config(replicas=5))
    with pytest.raises(
        ConfigError, match=r"engine\.device is cuda:1, and each replica takes a GPU of its own"
    ):
        replicas._environments(config("engine.device=cuda:1", replicas=2))


def test_without_gpus_the_cores_are_shared(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(replicas.os, "sched_getaffinity", lambda _: set(range(8)))
    assert [each["OMP_NUM_THREADS"] for each in replicas._environments(config(replicas=2))] == [
        "4",
        "4",
    ]


def test_the_setting_of_before_says_what_took_its_place(lightopd, tmp_path):
    asked = ["rollout", "--student", "S", "--prompts", "P", "--cache", tmp_path, "--engine", "vllm"]
    code, _, err = lightopd(*asked, "--set", "engine.data_parallel_size=4")
    assert (code, "set sharing.replicas to 4 (--replicas 4) instead" in err) == (2, True), err
    assert config("engine.kind=vllm", "engine.data_parallel_size=1").engine.kind == "vllm"
    code, _, err = lightopd(*asked, "--replicas", 2, "--exclusive")
    assert (code, "leave one out" in err) == (2, True), err
