"""The benchmark of growth runs to its line on caches of a few thousand tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_growth_prints_one_line_with_every_figure_of_a_larger_and_a_smaller_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--tokens", "8000", "--per-shard", "8", "--folder", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "growth.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["tokens"], told["against_tokens"], told["shards"]) == (8192, 2048, 4)
    queries = ("truncated_share", "gap_by_domain", "gap_by_position", "tail_mass", "lengths")
    clocks = {f"query_{name}_{ending}" for name in queries for ending in ("s", "clock_s")}
    others = {"index_s", "verify_s", "train_start_s", "train_step_s"}
    assert set(told["figures"]) == clocks | others | {f"{of}_peak_mib" for of in ("sql", "verify", "train")}
    assert all(figure["ours"] > 0 for figure in told["figures"].values())
    assert not list(tmp_path.iterdir())
