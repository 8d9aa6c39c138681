"""A disk that fills up in the middle of a run, and a batch larger than memory."""

import logging
import resource

import pytest
import torch

from lightopd.errors import OutputError, TrainingError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.training import module
from lightopd.training.checkpoint import newest_checkpoint
from lightopd.training.fit import fit
from lightopd.training.metrics import read_metrics

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


def gpu_allocator_fails(*_):
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
