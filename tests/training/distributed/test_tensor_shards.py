"""Tensors stored in shares: read by any number of processes and by torch, and put together as one model."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from model_families import FAMILIES, make_model
from ranks import as_rank
from recording_disk import RecordingDisk
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM

from lightopd.errors import InputError
from lightopd.lineage.tensor_hashes import hash_tensors
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.checkpoints.checkpoint import (
    TrainerState,
    checkpoint_folders,
    complete_checkpoint,
    newest_checkpoint,
)
from lightopd.training.distributed.fsdp import weights_of
from lightopd.training.student.adapters import load_student
from lightopd.training.weight_files import consolidate as assembly
from lightopd.training.weight_files.consolidate import write_whole
from lightopd.training.weight_files.tensor_shards import StoredSet, is_shared, write_share

TENSORS = {
    "matrix": torch.arange(35.0).reshape(7, 5),
    "experts": torch.arange(24.0).reshape(2, 3, 4).to(torch.bfloat16),
    "norm": torch.arange(9.0),
    "one": torch.tensor([3.0]),
}
WHOLE = {"step": torch.tensor(12.0)}


def share_of(tensor, mesh):
    """What `fully_shard` leaves of a tensor on this rank."""
    rows = Shard(0)._split_tensor(tensor, mesh.size(), with_padding=False)[0][mesh.get_local_rank()]
    return DTensor.from_local(
        rows.clone(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def write_all(folder, count, tensors, whole=()):
    for rank in range(count):
        with as_rank(rank, count) as mesh:
            shares = {name: share_of(tensor, mesh) for name, tensor in tensors.items()}
            write_share(folder, {**shares, **dict(whole)}, rank, count)


def test_a_share_lies_on_the_disk_before_the_first_process_names_the_checkpoint(tmp_path, monkeypatch):
    disk = RecordingDisk().install(monkeypatch)
    path = write_share(tmp_path / "model", WHOLE, 0, 2)
    assert disk.events == [("fsync", path, path.read_bytes())]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_of_any_number_give_back_tensors_and_hashes(tmp_path, count):
    write_all(tmp_path / "optimizer", count, TENSORS, WHOLE)
    stored = StoredSet(tmp_path, "optimizer")
    assert set(stored) == {*TENSORS, *WHOLE}
    for name, tensor in {**TENSORS, **WHOLE}.items():
        assert torch.equal(stored.whole(name), tensor)
        assert stored.whole(name).dtype == tensor.dtype
    save_file({**TENSORS, **WHOLE}, tmp_path / "whole.safetensors")
    assert stored.hashes() == hash_tensors([tmp_path / "whole.safetensors"])


@pytest.mark.parametrize("written_by", [None, 1, 3])
@pytest.mark.parametrize("count", [2, 4])
def test_each_process_gets_its_own_rows_whoever_wrote_them(tmp_path, written_by, count):
    if written_by is None:
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        write_all(tmp_path / "model", written_by, TENSORS)
    stored = StoredSet(tmp_path, "model")
    for rank in range(count):
        with as_rank(rank, count) as mesh:
            for name, tensor in TENSORS.items():
                parameter = share_of(tensor, mesh)
                found = stored.like(name, parameter)
                assert found.placements == parameter.placements
                assert found.shape == tensor.shape
                assert torch.equal(found.to_local(), parameter.to_local())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_shares_with_its_own_reader(tmp_path):
    write_all(tmp_path / "model", 3, TENSORS)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "model")), no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)


def test_a_damaged_share_is_named(tmp_path):
    write_all(tmp_path / "model", 2, TENSORS)
    (tmp_path / "model" / "rank-00001-of-00002.safetensors").write_bytes(b"no tensors")
    with pytest.raises(
        InputError, match=r"rank-00001-of-00002\.safetensors cannot be read .*; delete the che"
    ):
        StoredSet(tmp_path, "model")


def test_a_checkpoint_that_lacks_a_share_or_part_of_one_is_passed_over(tmp_path):
    for step in (2, 4, 6):
        part, final = checkpoint_folders(tmp_path, step)
        part.mkdir()
        write_all(part / "model", 2, TENSORS)
        complete_checkpoint(part, final, TrainerState(step=step, recipe={}))
    assert newest_checkpoint(tmp_path)[1].step == 6
    (tmp_path / "step-000006" / "model" / "rank-00000-of-00002.safetensors").unlink()
    assert newest_checkpoint(tmp_path)[1].step == 4
    os.truncate(tmp_path / "step-000004" / "model" / "rank-00001-of-00002.safetensors", 100)
    assert newest_checkpoint(tmp_path)[1].step == 2


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A model as one process saves it, and its checkpoint in two shares."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32)
    shutil.copytree(folder / "whole", folder / "shares", ignore=shutil.ignore_patterns("*.safetensors"))
    write_all(folder / "shares" / "model", 2, {n: t.detach() for n, t in weights_of(model).items()})
    return folder


def test_a_model_put_together_has_the_bytes_that_one_process_saves(saved, tmp_path):
    assert is_shared(saved / "shares")
    write_whole(saved / "shares", tmp_path, trust_remote_code=False)
    file = "model.safetensors"
    assert (tmp_path / file).read_bytes() == (saved / "whole" / file).read_bytes()


def test_a_large_model_becomes_files_with_an_index(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "LARGEST_FILE", 20_000)
    write_whole(saved / "shares", tmp_path, trust_remote_code=False)
    AutoModelForCausalLM.from_pretrained(saved / "whole").save_pretrained(
        tmp_path / "theirs", max_shard_size=20_000
    )
    shapes = [folder / "model.safetensors.index.json" for folder in (tmp_path, tmp_path / "theirs")]
    ours, theirs = (json.loads(path.read_text()) for path in shapes)
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    expected = load_file(saved / "whole" / "model.safetensors")
    for name, file in ours["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], expected[name])
        assert (tmp_path / file).stat().st_size < 30_000


def test_training_goes_on_with_the_weights_in_shares(saved):
    student = ModelConfig(path=str(saved / "whole"))
    plain = load_student(student, FinetuneConfig(), None)
    found = load_student(student, FinetuneConfig(), saved / "shares")
    states = [model.state_dict() for model in (plain, found)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
    for one, other in zip(plain.buffers(), found.buffers(), strict=True):
        assert torch.equal(one, other)
    assert all(parameter.requires_grad for parameter in found.parameters())
    assert found.generation_config.to_dict() == plain.generation_config.to_dict()
