"""Checkpoints are whole or not there, and a run that lost its process goes on to the same weights."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recording_disk import RecordingDisk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightopd.errors import OutputError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.checkpoints.checkpoint import (
    TrainerState,
    load_optimizer,
    newest_checkpoint,
    prune_checkpoints,
    remove_leftovers,
)
from lightopd.training.checkpoints.export import export_student
from lightopd.training.checkpoints.save import save_checkpoint
from lightopd.training.fit import fit
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.optimizer import make_optimizer

SETTINGS = {
    "steps": 6,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "checkpoint_every": 2,
}
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightopd.cache.store import open_cache
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.fit import fit
cache, student, out, settings, objective = sys.argv[1:]
finetune = FinetuneConfig.model_validate_json(settings)
objective = ObjectiveConfig.model_validate_json(objective)
result = fit(open_cache(Path(cache)), ModelConfig(path=student), Path(out), finetune, objective)
Path("main" if result.is_main else "helper").touch()
"""


@pytest.fixture
def trained(student_folder):
    """The student and an optimiser that has done one step."""
    model = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    optimizer = make_optimizer(model, OptimizerConfig(lr=1e-3))
    model(input_ids=torch.arange(8)[None]).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, trained, student_folder, step):
    state = TrainerState(step=step, recipe={"seed": 0})
    return save_checkpoint(folder, *trained, ModelConfig(path=str(student_folder)), state)


def test_every_file_of_a_checkpoint_and_of_the_exported_student_survives_a_crash(
    trained, student_folder, tmp_path, monkeypatch
):
    disk = RecordingDisk().install(monkeypatch)
    path = save(tmp_path / "checkpoints", trained, student_folder, 1)
    export_student(path, tmp_path / "student")
    disk.check_survives(path)
    disk.check_survives(tmp_path / "student")


def test_the_optimiser_comes_back_as_it_was(trained, student_folder, tmp_path):
    model, optimizer = trained
    path = save(tmp_path, trained, student_folder, 1)
    copy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    fresh = make_optimizer(copy, OptimizerConfig(lr=1e-3))
    load_optimizer(path, copy, fresh)
    for one, other in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[one].keys() == fresh.state[other].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, fresh.state[other][key])


def test_the_newest_whole_checkpoint_is_found_by_its_number(trained, student_folder, tmp_path):
    for step in (2, 10, 1_000_000):
        save(tmp_path, trained, student_folder, step)
    assert newest_checkpoint(tmp_path)[1].step == 1_000_000


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_and_named(
    trained, student_folder, tmp_path, caplog, file
):
    for step in (2, 4):
        save(tmp_path, trained, student_folder, step)
    damaged = tmp_path / "step-000004" / file
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    assert newest_checkpoint(tmp_path)[1].step == 2
    assert f"checkpoint {damaged.parent} is not whole, or not what was written" in caplog.text


def test_a_checkpoint_written_without_hashes_still_counts(trained, student_folder, tmp_path):
    state_file = save(tmp_path, trained, student_folder, 2) / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert state.pop("sha256").keys() == state["sizes_bytes"].keys()
    state_file.write_text(json.dumps(state))
    assert newest_checkpoint(tmp_path)[1].step == 2


def test_a_deletion_that_was_killed_leaves_no_checkpoint_and_is_finished(
    trained, student_folder, tmp_path, monkeypatch
):
    for step in (2, 4, 6):
        save(tmp_path, trained, student_folder, step)

    def killed(path):
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000004", "step-000006"]
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]


def test_a_checkpoint_that_lacks_a_file_is_passed_over_and_named(trained, student_folder, tmp_path, caplog):
    for step in (2, 4, 6):
        save(tmp_path, trained, student_folder, step)
    (tmp_path / "step-000006" / "tokenizer.json").unlink()
    os.truncate(tmp_path / "step-000004" / "optimizer.safetensors", 100)
    path, state = newest_checkpoint(tmp_path)
    assert (path.name, state.step) == ("step-000002", 2)
    assert [record.args[0].name for record in caplog.records] == ["step-000006", "step-000004"]


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_full_disk_is_an_error_and_the_previous_checkpoint_survives(
    trained, student_folder, tmp_path, share
):
    previous = save(tmp_path, trained, student_folder, 2)
    largest = max(file.stat().st_size for file in previous.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * largest), hard))
    try:
        with pytest.raises(OutputError, match="step-000004"):
            save(tmp_path, trained, student_folder, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    assert newest_checkpoint(tmp_path)[0] == previous


def test_exporting_replaces_an_older_student(trained, student_folder, tmp_path):
    path = save(tmp_path, trained, student_folder, 2)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "old").touch()
    export_student(path, tmp_path / "student")
    assert {file.name for file in (tmp_path / "student").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_lineage_and_foreign_weights_are_not_copied(trained, student_folder, tmp_path):
    source = shutil.copytree(student_folder, tmp_path / "source")
    for name in ("lightopd_student.json", "pytorch_model.bin", "chat_template.jinja"):
        (source / name).write_text("x")
    path = save(tmp_path / "checkpoints", trained, source, 2)
    assert (path / "chat_template.jinja").read_text() == "x"
    assert not (path / "lightopd_student.json").exists()
    assert not (path / "pytorch_model.bin").exists()


def run_here(cache, student, out, objective=(), **settings):
    finetune = FinetuneConfig(**(SETTINGS | settings))
    return fit(cache, ModelConfig(path=str(student)), out, finetune, ObjectiveConfig(**dict(objective)))


def start_process(script, cache, student, out, objective=(), **settings):
    script.write_text(SCRIPT)
    command = [sys.executable, script, cache.path, student, out, json.dumps(SETTINGS | settings)]
    command.append(json.dumps(dict(objective)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command)], env=environment, cwd=script.parent)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(make_cache, student_folder, tmp_path):
    cache, cut = make_cache(tmp_path / "cache"), tmp_path / "cut"
    process = start_process(tmp_path / "run.py", cache, student_folder, cut, steps=400)
    while len(read_metrics(cut / "metrics.csv")) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = newest_checkpoint(cut / "checkpoints")[1].step
    assert 2 <= done < 400
    whole = run_here(cache, student_folder, tmp_path / "whole", steps=done + 4)
    again = run_here(cache, student_folder, cut, steps=done + 4)
    assert losses(again) == losses(whole)
    assert (again.student / "model.safetensors").read_bytes() == (
        whole.student / "model.safetensors"
    ).read_bytes()


# Pivots need statistics of the step, the curriculum totals and a state, the held-out loss a sum: over ranks.
SHARED = {
    "curriculum": {"kind": "lengths", "lengths": [2, 5, 13], "every": 2},
    "target": {"kind": "divergence"},
    "rollout_weights": [{"kind": "pivots", "threshold": 0.1}],
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", [{"target": "log_ratio"}, SHARED])
def test_two_processes_with_gloo_give_the_numbers_of_one(make_cache, student_folder, tmp_path, objective):
    cache, out = make_cache(tmp_path / "cache"), tmp_path / "two"
    held = {"held_out": 4, "held_out_every": 3}
    settings = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", **held}
    process = start_process(tmp_path / "run.py", cache, student_folder, out, objective, **settings)
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "main").exists()
    assert (tmp_path / "helper").exists()
    one = run_here(cache, student_folder, tmp_path / "one", objective, **held)
    rows = [read_metrics(folder / "metrics.csv") for folder in (tmp_path / "one", out)]
    assert [row["held_out"] for row in rows[0]] == pytest.approx(
        [row["held_out"] for row in rows[1]], rel=1e-6, nan_ok=True
    )
    assert losses(one) == pytest.approx([row["loss"] for row in read_metrics(out / "metrics.csv")], rel=1e-6)
    left, right = (load_file(folder / "student" / "model.safetensors") for folder in (tmp_path / "one", out))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-6)


def losses(result):
    return [row["loss"] for row in read_metrics(Path(result.student).parent / "metrics.csv")]
