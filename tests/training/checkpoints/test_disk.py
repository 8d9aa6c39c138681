"""A device whose disk is full, or that is killed while it writes: one line, and the run can be resumed."""

import json
import os
import subprocess
import sys

import pytest

from lightopd.training.checkpoints.checkpoint import newest_checkpoint
from lightopd.training.measures.metrics_file import read_metrics

SETTINGS = {
    "steps": 4,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "checkpoint_every": 2,
    "accelerator": "cpu",
    "devices": 2,
    "strategy": "fsdp",
}
SCRIPT = """
import errno, os, sys
from pathlib import Path
from lightopd.cache.store import open_cache
from lightopd.errors import LightopdError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.checkpoints import save
from lightopd.training.fit import fit
cache, student, out, settings, rank, how = sys.argv[1:]
def fail(*_):
    if how == "killed":
        os.kill(os.getpid(), 9)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if os.environ.get("RANK") == rank:
    save.write_share = fail
finetune = FinetuneConfig.model_validate_json(settings)
try:
    fit(open_cache(Path(cache)), ModelConfig(path=student), Path(out), finetune, ObjectiveConfig())
except LightopdError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(0, "full"), (1, "full"), (1, "killed")])
def test_a_rank_that_cannot_write_ends_all_and_the_checkpoint_before_survives(
    ranks, make_cache, student_folder, tmp_path, rank, how
):
    cache, out, whole = make_cache(tmp_path / "cache"), tmp_path / "out", tmp_path / "whole"
    ranks(cache, student_folder, out, **(SETTINGS | {"steps": 2}))
    words = [cache.path, student_folder, out, json.dumps(SETTINGS), rank, how]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    if how == "full":
        where = out / "checkpoints" / "step-000004"
        assert said.startswith(f"OutputError: the process of rank {rank} cannot write {where} (")
        assert "No space left on device; free space there" in said
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    else:
        assert said.startswith(f"TrainingError: the process of rank {rank} was killed (SIGKILL)")
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    assert newest_checkpoint(out / "checkpoints")[1].step == 2
    ranks(cache, student_folder, out, **SETTINGS)
    ranks(cache, student_folder, whole, **SETTINGS)
    losses = [[row["loss"] for row in read_metrics(folder / "metrics.csv")] for folder in (out, whole)]
    assert losses[0] == losses[1]
    files = [sorted(newest_checkpoint(folder / "checkpoints")[0].glob("*/*")) for folder in (out, whole)]
    assert len(files[0]) == 4
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-000002", "step-000004"}
