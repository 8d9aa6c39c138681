"""A disk that fills up, a batch larger than memory, weights that break, a cache that changes."""

import errno
import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from lightopd.cache.manifests import rollouts_folder
from lightopd.cache.shards import shard_path
from lightopd.errors import OutputError, TrainingError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training import module
from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.fit import fit
from lightopd.training.measures.metrics_file import read_metrics

SETTINGS = {"steps": 6, "batch_sequences": 8, "micro_batch_tokens": 60, "checkpoint_every": 2}
LARGEST_BYTES = 4096
"""More than metrics.csv, less than the weights."""


@pytest.fixture
def train(make_cache, student_folder, tmp_path):
    """Function that trains into a folder of the test."""
    cache = make_cache(tmp_path / "cache")

    def run(out, **settings):
        finetune = FinetuneConfig(**(SETTINGS | settings))
        return fit(cache, ModelConfig(path=str(student_folder)), tmp_path / out, finetune, ObjectiveConfig())

    return run


class FillDisk(logging.Handler):
    """Lets no file grow any more once the first checkpoint is written."""

    def emit(self, record):
        if record.getMessage().startswith("checkpoint"):
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_BYTES, hard))


@pytest.fixture
def disk_fills():
    """The disk is full after the first checkpoint, until the test calls what this returns."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    logger, handler = logging.getLogger("lightopd.training.callbacks"), FillDisk()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def free():
        logger.removeHandler(handler)
        logger.setLevel(level)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield free
    free()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_run_goes_on(train, disk_fills, tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*step-000004.*(run again|same command again)"):
        train("cut")
    disk_fills()
    path, state = newest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert [file.name for file in path.parent.iterdir()] == ["step-000002"]
    assert state.step == 2
    cut, whole = train("cut"), train("whole")
    weights = [(each.student / "model.safetensors").read_bytes() for each in (cut, whole)]
    assert weights[0] == weights[1]
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / out / "metrics.csv")] for out in ("cut", "whole")
    ]
    assert losses[0] == losses[1]


def allocator_fails(*_):
    torch.empty(2**60)


def gpu_allocator_fails(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("fails", [allocator_fails, gpu_allocator_fails])
def test_a_batch_larger_than_memory_names_the_numbers_to_change(train, monkeypatch, tmp_path, fails):
    train("out", steps=2)
    monkeypatch.setattr(module, "student_tokens", lambda *_: fails())
    with pytest.raises(TrainingError, match=r"no memory for a micro-batch of \d+ padded tokens") as caught:
        train("out")
    assert "lower micro_batch_tokens (now 60, at least " in str(caught.value)
    assert "set gradient_checkpointing to true, or set precision to bf16-mixed" in str(caught.value)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints")[1].step == 2


def test_an_optimiser_without_room_for_its_moments_names_what_makes_them_smaller(train, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", gpu_allocator_fails)
    with pytest.raises(TrainingError, match=r"no memory for an optimiser step: AdamW keeps \d") as caught:
        train("out")
    assert "train an adapter (adapter.kind lora), or share them over several devices" in str(caught.value)


def test_held_out_rollouts_without_room_name_the_numbers_to_change(train, monkeypatch):
    monkeypatch.setattr(module, "held_out_loss", gpu_allocator_fails)
    with pytest.raises(TrainingError, match=r"no memory for a micro-batch of \d+ padded tokens"):
        train("out", held_out=4, held_out_every=1)


def test_weights_that_are_not_finite_are_neither_kept_nor_exported(train, monkeypatch, tmp_path):
    done, step = [], torch.optim.AdamW.step

    def breaks_at_the_fourth(self, *rest, **named):
        found = step(self, *rest, **named)
        done.append(found)
        if len(done) == 4:
            self.param_groups[0]["params"][0].data.view(-1)[3] = torch.inf
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", breaks_at_the_fourth)
    with pytest.raises(
        TrainingError, match=r"^1 weight tensors are not finite after step 4, which is not kept"
    ):
        train("out", steps=4)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints")[1].step == 2
    assert not (tmp_path / "out" / "student").exists()


def test_a_disk_that_is_full_at_export_is_told_with_its_numbers(train, monkeypatch, tmp_path):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", source)

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OutputError, match=r"bytes\): No space left on device; free space there") as caught:
        train("out")
    assert "[(" not in str(caught.value)
    assert newest_checkpoint(tmp_path / "out" / "checkpoints")[1].step == 6


def test_a_cache_that_changes_while_it_is_in_memory_is_told_of(train, tmp_path, monkeypatch):
    path = shard_path(rollouts_folder(tmp_path / "cache"), 1)
    trains = module.StudentModule.training_step

    def touching(self, *rest):
        os.utime(path)
        return trains(self, *rest)

    assert train("whole").notes == ()
    monkeypatch.setattr(module.StudentModule, "training_step", touching)
    assert train("out").notes == (
        f"{path} changed during training, which had read and checked them before; the student is of the "
        "cache as it was",
    )
    weights = [
        Path(tmp_path / out / "student" / "model.safetensors").read_bytes() for out in ("whole", "out")
    ]
    assert weights[0] == weights[1]
