"""FSDP over two processes on CPU (gloo): the run of one process, its checkpoints, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lightopd.errors import ConfigError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.training.checkpoint import newest_checkpoint
from lightopd.training.fit import fit
from lightopd.training.held_out import HeldOut
from lightopd.training.metrics import read_metrics
from lightopd.training.shards import ShardStore, check_shards, index_cache

SETTINGS = {
    "steps": 6,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "checkpoint_every": 2,
}
SHARDED = {"accelerator": "cpu", "devices": 2, "strategy": "fsdp"}
SCRIPT = """
import sys
from pathlib import Path
from lightopd.cache.store import open_cache
from lightopd.errors import ConfigError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.training import callbacks
from lightopd.training.fit import fit
cache, student, out, settings, objective = sys.argv[1:]
finetune = FinetuneConfig.model_validate_json(settings)
objective = ObjectiveConfig.model_validate_json(objective)
gather = callbacks.gather
def noted(student, optimizer, *, keep):
    gathered = gather(student, optimizer, keep=keep)
    held = [parameter.to_local().numel() for parameter in student.parameters()]
    share = sum(held) / sum(parameter.numel() for parameter in student.parameters())
    (Path(out) / f"share-{keep}").write_text(str(share))
    return gathered
callbacks.gather = noted
fit(open_cache(Path(cache)), ModelConfig(path=student), Path(out), finetune, objective)
"""


def run_whole(cache, student, out, objective=(), **settings):
    finetune = FinetuneConfig(**(SETTINGS | settings))
    fit(cache, ModelConfig(path=str(student)), out, finetune, ObjectiveConfig(**dict(objective)))


def run_sharded(cache, student, out, objective=(), **settings):
    """Train over two processes; returns what share of the weights each of them held at the end."""
    words = [cache.path, student, out, json.dumps(SETTINGS | SHARDED | settings), json.dumps(dict(objective))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(file.read_text()) for file in sorted(out.glob("share-*"))]


def assert_close(one, other):
    left, right = (read_metrics(folder / "metrics.csv") for folder in (one, other))
    for name in ("loss", "grad_norm", "entropy"):
        assert [row[name] for row in left] == pytest.approx([row[name] for row in right], rel=1e-6, abs=1e-6)
    checkpoints = [newest_checkpoint(folder / "checkpoints")[0] for folder in (one, other)]
    for file in ("model.safetensors", "optimizer.safetensors"):
        weights = [load_file(checkpoint / file) for checkpoint in checkpoints]
        assert weights[0].keys() == weights[1].keys()
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, weights[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_two_shards_give_the_run_of_one_process_and_go_on(make_cache, student_folder, tmp_path):
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    run_whole(cache, student_folder, one)
    run_whole(cache, student_folder, two, steps=2)
    run_sharded(cache, student_folder, two, steps=4)
    shares = run_sharded(cache, student_folder, two)
    assert shares == [pytest.approx(0.5, abs=0.05)] * 2
    assert_close(one, two)
    configs = [json.loads((out / "student" / "config.json").read_text()) for out in (one, two)]
    assert configs[0] == configs[1]


# Pivots need a pass without gradient first; what is held out is measured between steps.
MORE = {"target": {"kind": "divergence"}, "rollout_weights": [{"kind": "pivots", "threshold": 0.1}]}


@pytest.mark.slow
def test_passes_without_gradient_and_recomputed_layers_change_nothing(make_cache, teacher, tmp_path):
    untied = tmp_path / "untied"
    teacher.save_pretrained(untied)
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    held = {"held_out": 6, "held_out_every": 2}
    run_whole(cache, untied, one, MORE, **held)
    run_sharded(cache, untied, two, MORE, **held, gradient_checkpointing=True)
    assert_close(one, two)
    rows = [read_metrics(out / "metrics.csv") for out in (one, two)]
    held_out = [[row["held_out"] for row in run] for run in rows]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6, nan_ok=True)


def test_a_jump_is_refused(make_cache, student_folder, tmp_path):
    cache = make_cache(tmp_path / "cache")
    with pytest.raises(ConfigError, match="needs whole weights on a device; set strategy to ddp"):
        run_whole(cache, student_folder, tmp_path / "out", {"jump": {}}, strategy="fsdp", held_out=4)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_runs_as_many_held_out_micro_batches(make_cache, tmp_path, world_size):
    cache = make_cache(tmp_path / "cache")
    index = index_cache(cache, ("teacher",), ())
    store = ShardStore(cache, ("teacher",), (), check_shards(cache, ("teacher",)), index.bytes_S, 2**20)
    held_out = HeldOut(index, store, ObjectiveConfig(), micro_batch_tokens=60)
    alone = held_out.rows(0, 1)
    assert len(alone) % world_size, "they cannot be shared equally"
    shares = [held_out.rows(rank, world_size) for rank in range(world_size)]
    counts = [len(share) + len(held_out.idle_rows(rank, world_size)) for rank, share in enumerate(shares)]
    assert set(counts) == {-(-len(alone) // world_size)}
    assert held_out.idle_rows(0, 1) == []
    ids = [rollout_id for share in shares for rows in share for rollout_id in rows.rollout_ids]
    assert sorted(ids) == sorted(rollout_id for rows in alone for rollout_id in rows.rollout_ids)
