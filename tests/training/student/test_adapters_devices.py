"""Adapters on two devices: the run of one, under every strategy, and on from one strategy to the other."""

import pytest
import torch
from safetensors.torch import load_file

from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.measures.metrics_file import read_metrics

SETTINGS = {
    "steps": 4,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-3, "eps": 1e-3},
    "checkpoint_every": 2,
    "ema_decay": 0.5,
}
DDP = {"devices": 2, "strategy": "ddp"}
FSDP = {"devices": 2, "strategy": "fsdp"}
ADAPTER = "adapter_model.safetensors"
FILES = {"checkpoint": (ADAPTER, "optimizer.safetensors", "average.safetensors"), "student": (ADAPTER,)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("shapes", [(DDP, DDP), (FSDP, FSDP), (DDP, FSDP), (FSDP, {})])
def test_two_devices_train_the_adapter_of_one(ranks, make_cache, student_folder, tmp_path, kind, shapes):
    cache, one, two = make_cache(tmp_path / "cache"), tmp_path / "one", tmp_path / "two"
    settings = SETTINGS | {"adapter": {"kind": kind, "rank": 4, "alpha": 8}}
    ranks(cache, student_folder, one, **settings)
    for steps, shape in zip((2, 4), shapes, strict=True):
        recomputed = {"gradient_checkpointing": kind == "dora"}
        ranks(cache, student_folder, two, **(settings | shape | recomputed | {"steps": steps}))
    left, right = (read_metrics(out / "metrics.csv") for out in (one, two))
    for name in ("loss", "grad_norm", "entropy"):
        assert [row[name] for row in left] == pytest.approx([row[name] for row in right], rel=1e-6, abs=1e-6)
    for folder in ("checkpoint", "student"):
        for file in FILES[folder]:
            tensors = [load_file(place_of(out, folder) / file) for out in (one, two)]
            assert tensors[0].keys() == tensors[1].keys()
            for name, tensor in tensors[0].items():
                torch.testing.assert_close(tensor, tensors[1][name], rtol=1e-6, atol=1e-6)
    names = [{path.name for path in (out / "student").iterdir()} for out in (one, two)]
    assert names[0] == names[1]


def place_of(out, folder):
    return newest_checkpoint(out / "checkpoints")[0] if folder == "checkpoint" else out / folder
