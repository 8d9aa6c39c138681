"""The benchmark of a GPU runs to its end on a CPU, case by case."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_case_gives_a_line_on_a_cpu_and_says_what_it_is():
    patient = ("--time-limit-s", "300", "--total-limit-s", "1800")  # a machine that tests share is slow
    done = run("--device", "cpu", "--tiny", "--no-peers", *patient)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "liger-kernel==0.8.5 is not there: its figures are left out" in lines
    figures = {one["name"]: one for one in (json.loads(line) for line in lines if line.startswith("{"))}
    assert set(figures) >= {
        "kernel_time_n64_d32_m1",
        "kernel_time_n64_d32_m65",
        "step_time_sampled",
        "step_time_top64",
        "step_time_compiled",
        "scoring_top64",
        "large_peak",
        "large_estimate",
    }
    assert all("CPU" in one["device"] and one["ratio"] > 0 for one in figures.values())
    assert not [line for line in lines if "failed" in line or "ended" in line or "begun" in line]


def test_a_case_that_stands_still_is_ended_and_named():
    done = run("--device", "cpu", "--tiny", "--no-peers", "--time-limit-s", "0.01")
    assert done.returncode == 0
    assert "scoring ours: not done after 0.01 s, ended" in done.stdout


def test_no_case_begins_when_the_time_for_all_is_over():
    done = run("--device", "cpu", "--tiny", "--no-peers", "--total-limit-s", "0")
    assert done.returncode == 0
    assert "large: not begun, the time for all cases is over" in done.stdout


def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU here")
