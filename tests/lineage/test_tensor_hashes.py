import json
import os
import struct
from pathlib import Path

import pytest
import torch
from recording_disk import RecordingDisk
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightopd.errors import InputError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.schemas.configs import ModelConfig


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def make_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def identity(folder: Path) -> str:
    return fingerprint_model(ModelConfig(path=str(folder))).identity


def settle(folder: Path) -> None:
    """Make files look old, as files are that were not written a moment ago."""
    for file in folder.iterdir():
        os.utime(file, ns=(10**18, 10**18))


def test_a_changed_weight_is_seen_although_the_first_hash_was_remembered(tmp_path):
    folder = make_model(tmp_path / "model")
    settle(folder)
    before = identity(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert identity(folder) != before


def test_a_model_is_hashed_once_and_then_remembered(tmp_path):
    folder = make_model(tmp_path / "model")
    settle(folder)
    first = identity(folder)
    remembered = tmp_path / "xdg" / "lightopd" / "fingerprints.json"
    known = json.loads(remembered.read_text())
    file = str((folder / "model.safetensors").resolve())
    known[file]["tensors"][0][3] = "not what a second hash would give"
    remembered.write_text(json.dumps(known))
    assert identity(folder) != first


def test_a_file_written_a_moment_ago_is_not_remembered(tmp_path):
    identity(make_model(tmp_path / "model"))
    assert not (tmp_path / "xdg" / "lightopd" / "fingerprints.json").exists()


def test_remembered_files_that_are_gone_are_forgotten(tmp_path):
    for name in ("one", "two"):
        settle(make_model(tmp_path / name))
    identity(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").unlink()
    identity(tmp_path / "two")
    known = json.loads((tmp_path / "xdg" / "lightopd" / "fingerprints.json").read_text())
    assert list(known) == [str((tmp_path / "two" / "model.safetensors").resolve())]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"FILE": 3}', '{"FILE": {"size": SIZE, "mtime_ns": 1000000000000000000}}']
)
def test_a_corrupt_file_of_remembered_hashes_is_ignored(tmp_path, content):
    folder = make_model(tmp_path / "model")
    expected = identity(folder)
    settle(folder)
    file = (folder / "model.safetensors").resolve()
    remembered = tmp_path / "xdg" / "lightopd" / "fingerprints.json"
    remembered.parent.mkdir(parents=True)
    remembered.write_text(content.replace("FILE", str(file)).replace("SIZE", str(file.stat().st_size)))
    assert identity(folder) == expected
    assert str(file) in json.loads(remembered.read_text())


def test_a_cache_folder_that_cannot_be_made_is_no_reason_to_stop(tmp_path, caplog):
    folder = make_model(tmp_path / "model")
    settle(folder)
    (tmp_path / "xdg").write_text("a file where the folder should be")
    assert identity(folder)
    assert "hashed again next time" in caplog.text


@pytest.mark.parametrize("cut", ["header", "last byte", "length"])
def test_a_truncated_weight_file_is_named(tmp_path, cut):
    file = make_model(tmp_path / "model") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"header": content[:40], "last byte": content[:-1], "length": content[:5]}[cut])
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        identity(file.parent)


def test_a_header_that_is_no_json_is_named(tmp_path):
    file = make_model(tmp_path / "model") / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 4) + b"oops")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        identity(file.parent)


def test_pickled_weights_are_refused_with_what_to_do(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights only.*save_pretrained"):
        identity(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = tmp_path / "sharded"
    whole = make_model(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder, max_shard_size="5KB")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone.name} is missing"):
        identity(folder)


def test_remembered_hashes_survive_a_crash(tmp_path, monkeypatch):
    settle(make_model(tmp_path / "model"))
    disk = RecordingDisk().install(monkeypatch)
    assert identity(tmp_path / "model")
    disk.check_survives(tmp_path / "xdg" / "lightopd" / "fingerprints.json")
