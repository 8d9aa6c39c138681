"""One cache, several trainings: by `--sweep`, or by the command that a changed setting is refused with."""

import json
import re
import shlex
import shutil

import pytest
import yaml

from lightopd.cache.store import open_cache


@pytest.fixture
def run_file(world, tmp_path):
    """A run file over a pipeline whose rollouts and scores are there."""
    shutil.copytree(world.cache, tmp_path / "run" / "cache")
    settings = {
        "out": str(tmp_path / "run"), "teacher": str(world.teacher), "student": str(world.sft / "student"),
        "prompts": str(world.root / "prompts.jsonl"), "eval_prompts": str(world.root / "prompts.jsonl"),
        "rollout": {"sampling": {"n": 2, "max_tokens": 10}, "shard_rollouts": 6}, "precompute": {"top_k": 4},
        "train": {"steps": 2, "batch_sequences": 4}, "eval": {"sampling": {"max_tokens": 4}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_a_sweep_trains_once_for_each_value_on_one_cache(lightopd, run_file):
    out = run_file.parent / "run"
    code, shown, err = lightopd("run", "-c", run_file, "--sweep", "train.optimizer.lr=1e-4,3e-4")
    assert code == 0, err
    rows = json.loads((out / "sweep.report.json").read_text())["rows"]
    assert [row["optimizer.lr"] for row in rows] == ["1e-4", "3e-4"]
    assert all({"loss", "avg_at_k", "out"} <= row.keys() for row in rows)
    assert [yaml.safe_load((out / f"sweep/lr-{v}/train/train.yaml").read_text())["optimizer"]["lr"]
            for v in ("1e-4", "3e-4")] == [1e-4, 3e-4]  # fmt: skip
    assert shown.count("eval_before") == 1 or (out / "eval_before").is_dir()
    assert not (out / "train").exists()
    assert (out / "sweep/lr-1e-4/eval_after").is_dir()
    assert len(open_cache(out / "cache").signals) == 1
    code, _, err = lightopd("run", "-c", run_file, "--sweep", "train.optimizer.lr=1e-4,3e-4")
    assert code == 0
    assert err.count("nothing to do: ") == 2
    assert err.count("eval: nothing to do, ") == 4


def test_a_dry_sweep_says_what_each_value_would_run_and_writes_nothing(lightopd, run_file):
    out = run_file.parent / "run"
    before = sorted(out.rglob("*"))
    command = ["run", "-c", run_file, "--dry-run", "--sweep"]
    code, shown, err = lightopd(*command, "train.optimizer.lr=1e-4,3e-4")
    assert code == 0, err
    assert all(f"sweep/lr-{value}" in shown for value in ("1e-4", "3e-4"))
    assert "dry run" in shown
    assert sorted(out.rglob("*")) == before
    code, _, err = lightopd(*command, "train.batch_sequences=4,many")
    assert code == 2
    assert "'many'" in err
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ("train.optimizer.lr=1e-4", "several values"),
        ("rollout.sampling.n=1,2", "no setting of train"),
        ("train.optimizer.lr=1e-4,1e-4", "gives a value twice"),
        ("train.optimizer.rate=1e-4,3e-4", "unknown key optimizer.rate"),
        ("train.optimizer.lr=1e-4,x", "optimizer.lr: .* found 'x'"),
    ],
)
def test_a_sweep_that_is_none_is_refused_before_anything_is_made(lightopd, run_file, sweep, told):
    code, _, err = lightopd("run", "-c", run_file, "--sweep", sweep)
    assert code == 2
    assert re.search(told, err)
    assert not (run_file.parent / "run" / "sweep").exists()


def test_a_changed_setting_is_told_by_key_with_the_command_for_a_second_training(lightopd, world, tmp_path):
    asked = ["train", "--cache", world.cache, "--student", world.sft / "student", "--out", tmp_path / "train"]
    asked += ["--steps", "2", "--batch", "4"]
    assert lightopd(*asked)[0] == 0
    code, _, err = lightopd(*asked, "--lr", "3e-4")
    assert code == 8
    assert "optimizer.lr is 0.0003, there it was" in err
    command = re.search(r"lightopd (train -c .*)$", err.strip())[1]
    code, _, err = lightopd(*shlex.split(command))
    assert code == 0, err
    assert yaml.safe_load((tmp_path / "train-2" / "train.yaml").read_text())["optimizer"]["lr"] == 3e-4


def test_a_changed_part_of_the_objective_is_told_by_its_place(lightopd, world, tmp_path):
    asked = ["train", "--cache", world.cache, "--student", world.sft / "student", "--out", tmp_path / "train"]
    asked += ["--steps", "2", "--batch", "4"]
    assert lightopd(*asked)[0] == 0
    code, _, err = lightopd(*asked, "-c", "methods/lightning_opd", "--steps", "2")
    assert code == 8, err
    assert "objective.terms.0.target.kind" in err
    assert f"lightopd train with these settings and --out {tmp_path / 'train'}-2" in err
