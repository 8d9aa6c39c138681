"""Measurements in processes of their own: a benchmark calls itself with `--worker MEASURE CASE PATH`."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Measure = Callable[[str, Path], Any]


def main(
    description: str | None, measures: Mapping[str, Measure], report_all: Callable[[Path], None]
) -> None:
    """Be the worker that the command line asks for, or report everything, in a temporary folder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    job = parser.parse_args().worker
    if job is not None:
        _set_threads(int(os.environ["OMP_NUM_THREADS"]))
        print("\n" + json.dumps(measures[job[0]](job[1], Path(job[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        report_all(Path(folder))


def in_process(
    file: str, measure: str, case: str, path: Path, python: str = sys.executable, threads: int = 1
) -> Any:
    """What a worker of the benchmark `file` measures."""
    command = [python, file, "--worker", measure, case, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONWARNINGS"] = "ignore"
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def peak_mib() -> float:
    """Peak resident set of this process."""
    kib_per_unit = 1 / 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib_per_unit / 1024


def report(name: str, ours: float, against: float, ratio: float, goal: str, unit: str, peer: str) -> None:
    """One figure as one JSON line."""
    figures = {"ours": round(ours, 3), "against": round(against, 3), "ratio": round(ratio, 3)}
    print(json.dumps({"name": name, **figures, "goal": goal, "unit": unit, "peer": peer}), flush=True)


def write_cache(path: Path, **sizes: Any) -> None:
    """Write a random cache in a process of its own, since a child inherits its parent's peak on Linux."""
    code = "from support.synthetic_cache import write_random_cache; from pathlib import Path; "
    code += f"write_random_cache(Path({str(path)!r}), **{sizes!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def _set_threads(threads: int) -> None:
    import logging

    import pyarrow as pa
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    pa.set_cpu_count(threads)
    pa.set_io_thread_count(threads)
