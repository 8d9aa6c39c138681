"""The commands of docs/scale.md, as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bucket_servers import KEYS, S3Server
from hub_server import HubServer

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"
BLOCKS = dict(re.findall(r"<!-- test: (.+?) -->\n```bash\n(.*?)```", PAGE.read_text(), re.DOTALL))


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def run(script, folder, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment}
    words = ["bash", "-e", "-c", script]
    done = subprocess.run(words, cwd=folder, env=everything, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one process", "replicas", "shared folder"])
def test_each_layout_makes_the_same_cache(world, tmp_path, layout):
    shutil.copy(world.root / "prompts.jsonl", tmp_path)
    for name, folder in (("STUDENT", world.sft / "student"), ("TEACHER", world.teacher)):
        (tmp_path / name).symlink_to(folder)
    if layout == "shared folder":
        shutil.copytree(world.cache, tmp_path / "CACHE")
        shutil.rmtree(tmp_path / "CACHE/signals")
    script = BLOCKS[layout].replace(
        "--prompts", "--n 2 --set sampling.max_tokens=10 --set shard_rollouts=6 --prompts"
    )
    run(script, tmp_path)
    for part in ("rollouts", "signals/teacher"):
        assert shards_of(tmp_path / "CACHE" / part) == shards_of(world.cache / part)


@pytest.mark.slow
def test_a_bucket_gives_back_the_cache_and_is_read_in_place(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "CACHE")
    for name, folder in (("STUDENT", world.sft / "student"), ("TEACHER", world.teacher)):
        (tmp_path / name).symlink_to(folder)
    server = S3Server("moto", tmp_path / "server").start()
    try:
        server.make_bucket()
        reached = {"AWS_ENDPOINT_URL": server.endpoint, "XDG_CACHE_HOME": str(tmp_path / "user"), **KEYS}
        run(BLOCKS["bucket"], tmp_path, **reached)
        run(BLOCKS["bucket shared"], tmp_path, **reached)
        in_place = BLOCKS["bucket in place"].replace("--steps", "--set batch_sequences=6 --steps")
        run(in_place, tmp_path, **reached)
    finally:
        server.kill()
    assert (tmp_path / "RUN/student/model.safetensors").is_file()
    for part in ("rollouts", "signals/teacher"):
        assert shards_of(tmp_path / "CACHE2" / part) == shards_of(tmp_path / "CACHE" / part) != {}


@pytest.mark.slow
def test_a_dataset_on_the_hub_is_pulled_and_read_in_place(world, tmp_path):
    (tmp_path / "STUDENT").symlink_to(world.sft / "student")
    hub = HubServer()
    try:
        hub.commit("lab/rollouts", world.cache, "run1")
        script = BLOCKS["hub"].replace("--steps", "--set batch_sequences=6 --steps")
        reached = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        run(script, tmp_path, XDG_CACHE_HOME=str(tmp_path / "user"), **reached)
    finally:
        hub.close()
    assert (tmp_path / "RUN2/student/model.safetensors").is_file()
    for part in ("rollouts", "signals/teacher"):
        assert shards_of(tmp_path / "CACHE3" / part) == shards_of(world.cache / part) != {}
