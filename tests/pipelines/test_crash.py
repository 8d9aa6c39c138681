"""kill -9 at any moment of a stage, then the same command again: the same bytes as an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

KILLED = """
import os, signal, sys
name = sys.argv.pop(1)
def kill(event, arguments):
    if event in ("os.link", "os.rename") and os.path.basename(os.fsdecode(arguments[1])) == name:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""
"""A process that ends without warning in the moment in which a file or a folder would get a name."""
COMMAND = """
from lightopd.cli.main import main
main()
"""


def run(code, *arguments):
    """The command in a process of its own, with the number of threads that made the world; its exit code."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.returncode, done.stderr.decode()


def kill_before(name, *arguments):
    code, err = run(KILLED + COMMAND, name, *arguments)
    assert code == -signal.SIGKILL, err


def finish(*arguments):
    code, err = run(COMMAND, *arguments)
    assert code == 0, err


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


@pytest.mark.parametrize("shard", [0, 1, 2, 3])
def test_precompute_killed_after_any_shard_gives_the_same_bytes(world, tmp_path, shard):
    shutil.copytree(world.cache, tmp_path / "cache")
    wanted = shards_of(world.cache / "signals" / "teacher")
    signal_folder = tmp_path / "cache" / "signals" / "teacher"
    shutil.rmtree(signal_folder)
    arguments = ["precompute", "--cache", tmp_path / "cache", "--teacher", world.teacher, "--top-k", 4]
    kill_before(f"part-{shard:05d}.json", *arguments)
    assert (signal_folder / f"part-{shard:05d}.parquet").exists()
    finished = {path: path.stat().st_mtime_ns for path in signal_folder.glob("part-*.json")}
    finish(*arguments)
    assert shards_of(signal_folder) == wanted
    assert finished == {path: path.stat().st_mtime_ns for path in finished}, "a finished shard was made again"
    assert not list(signal_folder.glob(".*tmp*"))


def test_rollout_killed_in_the_middle_gives_the_same_bytes(world, tmp_path):
    wanted = shards_of(world.cache / "rollouts")
    arguments = ["rollout", "--student", world.sft / "student", "--prompts", world.root / "prompts.jsonl"]
    arguments += ["--cache", tmp_path / "cache", "--n", 2]
    arguments += ["--set", "sampling.max_tokens=10", "--set", "shard_rollouts=6"]
    kill_before("part-00002.parquet", *arguments)
    assert (tmp_path / "cache/rollouts/part-00001.json").exists()
    finish(*arguments)
    assert shards_of(tmp_path / "cache" / "rollouts") == wanted


def test_train_killed_after_a_checkpoint_gives_the_same_curve_and_weights(world, tmp_path):
    def arguments(out):
        common = ["--cache", world.cache, "--student", world.sft / "student", "--out", out, "--steps", 6]
        return ["train", *common, "--set", "batch_sequences=6", "--set", "checkpoint_every=1"]

    finish(*arguments(tmp_path / "whole"))
    kill_before("step-000004", *arguments(tmp_path / "cut"))
    assert (tmp_path / "cut/checkpoints/step-000003").exists()
    finish(*arguments(tmp_path / "cut"))
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    curves = [curve(tmp_path / name / "metrics.csv") for name in ("whole", "cut")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 6


def curve(path):
    """Every number of every step but those of the clock."""
    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    kept = [i for i, name in enumerate(header) if name not in ("seconds", "tokens_per_second")]
    return [[line[i] for i in kept] for line in lines]
