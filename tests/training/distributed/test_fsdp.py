"""FSDP over two processes on CPU (gloo): the run of one process, its checkpoints, and what it refuses."""

import json

import pytest
import torch
from ranks import as_rank
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from training_runs import read_first

from lightopd.errors import ConfigError
from lightopd.objectives.base.part import Needs
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.distributed.fsdp import shard_student
from lightopd.training.fit import fit
from lightopd.training.measures.held_out import HeldOut
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.student.adapters import load_student
from lightopd.training.warm_start import optimizer_state_hash
from lightopd.training.weight_files.tensor_shards import StoredSet, has_set, is_shared

SETTINGS = {
    "steps": 6,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "checkpoint_every": 2,
}
SHARDED = {"devices": 2, "strategy": "fsdp"}


def run_whole(cache, student, out, objective=(), continue_from=None, **settings):
    finetune, student = FinetuneConfig(**(SETTINGS | settings)), ModelConfig(path=str(student))
    fit(cache, student, out, finetune, ObjectiveConfig(**dict(objective)), continue_from=continue_from)


@pytest.fixture
def run_sharded(ranks):
    """Function that trains over two processes."""

    def run(cache, student, out, objective=(), **settings):
        ranks(cache, student, out, objective, **(SETTINGS | SHARDED | settings))

    return run


def assert_close(one, other):
    left, right = (read_metrics(folder / "metrics.csv") for folder in (one, other))
    for name in ("loss", "grad_norm", "entropy"):
        assert [row[name] for row in left] == pytest.approx([row[name] for row in right], rel=1e-6, abs=1e-6)
    for name in ("model", "optimizer", "average"):
        assert has_set(checkpoint_of(one), name) == has_set(checkpoint_of(other), name)
        if not has_set(checkpoint_of(one), name):
            continue
        left, right = (whole_set(folder, name) for folder in (one, other))
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            torch.testing.assert_close(tensor, right[key], rtol=1e-6, atol=1e-6)


def assert_students_close(one, other):
    left, right = (load_file(out / "student" / "model.safetensors") for out in (one, other))
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(tensor, right[key], rtol=1e-6, atol=1e-6)


def checkpoint_of(out):
    return newest_checkpoint(out / "checkpoints")[0]


def whole_set(out, name):
    stored = StoredSet(checkpoint_of(out), name)
    return {key: stored.whole(key) for key in stored}


@pytest.mark.slow
def test_two_shards_give_the_run_of_one_process_and_go_on(run_sharded, make_cache, student_folder, tmp_path):
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    run_whole(cache, student_folder, one)
    run_whole(cache, student_folder, two, steps=2)
    run_sharded(cache, student_folder, two, steps=4)
    run_sharded(cache, student_folder, two)
    assert_close(one, two)
    assert_students_close(one, two)
    sizes = [file.stat().st_size for file in checkpoint_of(two).glob("*/rank-*-of-00002.safetensors")]
    whole = sum(
        (checkpoint_of(one) / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")
    )
    assert len(sizes) == 4
    assert sum(sizes) == pytest.approx(whole, rel=0.2)
    assert max(sizes) < 0.4 * whole, "two thirds of it are the moments"
    names = [{path.name for path in (out / "student").iterdir()} for out in (one, two)]
    assert names[0] == names[1]
    configs = [json.loads((out / "student" / "config.json").read_text()) for out in (one, two)]
    assert configs[0] == configs[1]


@pytest.mark.slow
@pytest.mark.parametrize("next_shape", [{}, {"devices": 2, "strategy": "ddp"}, {"devices": 3}])
def test_a_run_goes_on_from_shares_in_another_shape(
    run_sharded, ranks, make_cache, student_folder, tmp_path, next_shape
):
    three = {"batch_sequences": 6}
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    run_whole(cache, student_folder, one, **three)
    run_sharded(cache, student_folder, two, steps=4, **three)
    if next_shape == {"devices": 3}:
        run_sharded(cache, student_folder, two, **three, **next_shape)
    else:
        ranks(cache, student_folder, two, **(SETTINGS | three | next_shape))
    assert_close(one, two)
    assert is_shared(checkpoint_of(two)) == (next_shape == {"devices": 3})


@pytest.mark.slow
def test_the_next_run_continues_from_shares_as_from_a_whole_one(
    run_sharded, make_cache, student_folder, tmp_path
):
    cache = make_cache(tmp_path / "cache")
    first, one, two = tmp_path / "first", tmp_path / "one", tmp_path / "two"
    run_sharded(cache, student_folder, first)
    run_whole(cache, first / "student", one, continue_from=first)
    run_sharded(cache, first / "student", two, continue_from=first)
    assert_close(one, two)
    recipes = [newest_checkpoint(out / "checkpoints")[1].recipe for out in (one, two)]
    assert recipes[0] == recipes[1]
    assert recipes[0]["continue_from"] == optimizer_state_hash(
        first, ModelConfig(path=str(first / "student"))
    )


# Pivots need a pass without gradient first; what is held out is measured between steps.
MORE = {"target": {"kind": "divergence"}, "rollout_weights": [{"kind": "pivots", "threshold": 0.1}]}


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_passes_without_gradient_and_recomputed_layers_change_nothing(
    run_sharded, make_cache, teacher, tmp_path, ema_decay
):
    untied = tmp_path / "untied"
    teacher.save_pretrained(untied)
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    held = {"held_out": 6, "held_out_every": 2, "ema_decay": ema_decay}
    run_whole(cache, untied, one, MORE, **held)
    run_sharded(cache, untied, two, MORE, **held, gradient_checkpointing=True)
    assert_close(one, two)
    rows = [read_metrics(out / "metrics.csv") for out in (one, two)]
    assert_students_close(one, two)
    held_out = [[row["held_out"] for row in run] for run in rows]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("adapter", [None, {"kind": "lora"}, {"kind": "dora"}])
def test_every_layer_is_a_group_of_its_own_and_a_rank_keeps_half(student_folder, adapter):
    student = load_student(ModelConfig(path=str(student_folder)), FinetuneConfig(adapter=adapter), None)
    whole = sum(parameter.numel() for parameter in student.parameters())
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    with as_rank(1, 2) as mesh:
        shard_student(student, mesh)
        groups = [name for name, module in student.named_modules() if isinstance(module, FSDPModule)]
        kept = sum(parameter.to_local().numel() for parameter in student.parameters())
    assert [name[-9:] for name in groups] == ["", ".layers.0", ".layers.1"]
    assert kept == pytest.approx(whole / 2, rel=0.05)
    assert [name for name, parameter in student.named_parameters() if parameter.requires_grad] == trained


def test_a_jump_is_refused(make_cache, student_folder, tmp_path):
    cache = make_cache(tmp_path / "cache")
    with pytest.raises(ConfigError, match="needs whole weights on a device; set strategy to ddp"):
        run_whole(cache, student_folder, tmp_path / "out", {"jump": {}}, strategy="fsdp", held_out=4)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_runs_as_many_held_out_micro_batches(make_cache, tmp_path, world_size):
    cache = make_cache(tmp_path / "cache")
    store, index = read_first(cache)
    held_out = HeldOut(index, store, ObjectiveConfig(), Needs(), micro_batch_tokens=60)
    alone = held_out.rows(0, 1)
    assert len(alone) % world_size, "they cannot be shared equally"
    shares = [held_out.rows(rank, world_size) for rank in range(world_size)]
    counts = [len(share) + len(held_out.idle_rows(rank, world_size)) for rank, share in enumerate(shares)]
    assert set(counts) == {-(-len(alone) // world_size)}
    assert held_out.idle_rows(0, 1) == []
    ids = [rollout_id for share in shares for rows in share for rollout_id in rows.rollout_ids]
    assert sorted(ids) == sorted(rollout_id for rows in alone for rollout_id in rows.rollout_ids)
