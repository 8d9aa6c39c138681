"""The evidence: every arm of the study, run by run, from the stages that users run.

    python benchmarks/study                      # all that is missing
    python benchmarks/study --only live lightning --seeds 2 --minutes 60
    python benchmarks/study --quick              # one seed of a few arms at a tenth of the size, nothing kept

A finished run is one line of docs/study/results/ARM.jsonl and is not run again while its settings and models
are the same. Runs that choose a setting have seed 1000 and other prompts than those that measure.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from arms import TUNING_SEED, Arm, Cell, combinations, read_arms
from cells import Line, identity, measure, run_of
from summary import best_tuning

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "study"
RESULTS = ROOT / "docs" / "study" / "results"
log = logging.getLogger("study")


def tuning_cells(name: str, arm: Arm) -> Iterator[Cell]:
    """The runs that choose a setting, for every regime and combination of the grid."""
    for regime in arm.regimes:
        for grid in combinations(arm.grid):
            for tuned in combinations(arm.tune):
                if tuned:
                    yield Cell(name, regime, grid, tuned, TUNING_SEED)


def measured_cells(name: str, arm: Arm, lines: list[Line], seeds: int | None) -> Iterator[Cell]:
    """The runs that measure, at the settings that were chosen."""
    for regime in arm.regimes:
        for grid in combinations(arm.grid):
            chosen = best_tuning(lines, (name, regime, grid)) or {}
            for seed in range(min(arm.seeds, seeds or arm.seeds)):
                yield Cell(name, regime, grid, tuple(chosen.items()), seed)


def read_lines(results: Path, name: str) -> list[Line]:
    """The finished runs of an arm."""
    path = results / f"{name}.jsonl"
    return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def keep_line(results: Path, name: str, line: Line) -> None:
    """Put a line in the place of an older one of its key, or at the end."""
    results.mkdir(parents=True, exist_ok=True)
    lines = {one["key"]: one for one in (*read_lines(results, name), line)}
    rows = "".join(json.dumps(one) + "\n" for one in lines.values())
    (results / f"{name}.jsonl").write_text(rows, encoding="utf-8")


def run_cells(name: str, arm: Arm, cells: Iterator[Cell], until_s: float, work: Path, results: Path) -> None:
    """Run what is not there yet, until the time is up."""
    done = {line["key"]: line["identity"] for line in read_lines(results, name)}
    for cell in cells:
        run = run_of(arm, cell, work)
        if done.get(cell.key) == identity(run, arm):
            continue
        if time.monotonic() > until_s:
            return
        started_s = time.monotonic()
        line = measure(arm, cell, run, work) | {"seconds": round(time.monotonic() - started_s, 1)}
        keep_line(results, name, line)
        log.warning("%s: accuracy %.4f, %.0f s", cell.key, line["accuracy"], line["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM")
    parser.add_argument("--seeds", type=int, help="at most so many of an arm")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after these")
    parser.add_argument("--work", type=Path, default=WORK)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    until_s = time.monotonic() + 60 * asked.minutes
    for name, arm in read_arms(asked.only).items():
        run_cells(name, arm, tuning_cells(name, arm), until_s, asked.work, RESULTS)
        lines = read_lines(RESULTS, name)
        run_cells(name, arm, measured_cells(name, arm, lines, asked.seeds), until_s, asked.work, RESULTS)


if __name__ == "__main__":
    main()
