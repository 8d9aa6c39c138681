"""A FIFO, a socket or a device in a model folder or a cache is no file, and is never opened."""

import json
import os
import shutil

import pytest
from tiny_models import save_model

from lightopd.cache.store import open_cache
from lightopd.cache.verify import verify
from lightopd.errors import CacheError, InputError
from lightopd.lineage.fingerprint import model_folder
from lightopd.schemas.configs import ModelConfig


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_a_model_folder_has_no_fifo(tmp_path, name):
    folder = save_model(tmp_path / "model", 0)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=rf"{name} is a FIFO, not a file; remove it"):
        model_folder(ModelConfig(path=str(folder)))


def test_an_adapters_folder_has_no_device(tmp_path):
    folder = save_model(tmp_path / "model", 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is a device, not a file"):
        model_folder(ModelConfig(path=str(folder), adapter=tmp_path / "adapter"))


@pytest.mark.parametrize(
    "name", ["lightopd.json", "rollouts/part-00000.json", "signals/teacher/part-00001.json"]
)
def test_a_cache_has_no_fifo(world, tmp_path, name):
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    (cache / name).unlink()
    os.mkfifo(cache / name)
    with pytest.raises(CacheError, match=rf"{name} is a FIFO, not a file"):
        open_cache(cache)
    assert [f"{name} is a FIFO" in str(finding) for finding in verify(cache)] == [True]


def test_a_manifest_that_claims_more_shards_than_can_be_is_refused_at_once(world, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    plain = json.loads((cache / "lightopd.json").read_text())
    (cache / "lightopd.json").write_text(json.dumps({**plain, "num_shards": 10**12}))
    with pytest.raises(CacheError, match=r"num_shards.*less than or equal to 1000000"):
        open_cache(cache)
    assert "num_shards" in str(verify(cache)[0])
