"""The evidence: every arm of the study, run by run, from the stages that users run.

    python benchmarks/study                      # all that is missing
    python benchmarks/study --only live lightning --seeds 2 --minutes 60
    python benchmarks/study --quick              # every kind of arm but TRL's, tiny, nothing kept
    python benchmarks/study --device cuda        # on the GPU

A finished run is one line of docs/study/results/REGIME/ARM.jsonl and is not run again while its settings and
models are the same. Several of these commands, given at once, share the runs. Runs that choose a setting have
seed 1000 and other prompts than those that measure.
After each arm docs/study.md is written anew. Runs on a GPU take the place of those on the CPU.
"""

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import models
import torch
from arms import STUDY, TUNING_SEED, Arm, Cell, combinations, read_arms, read_regime
from cells import QUICK, choose_device, current_device, identity, measure, run_of
from filelock import Timeout
from page import RESULTS, write_page
from summary import Line, alone_at, best_tuning, is_done, keep_line, read_lines

from lightopd.schemas.run import RunConfig

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "study"
QUICK_ARMS = ("untrained", "teacher", "live", "more_sft", "exopd", "drift_lightning", "horizon")
"""Every kind but TRL's, which needs an environment of its own, and every measure."""
SECONDS_OF_A_RUN = 50.0
"""Of a run that no other of its arm tells the length of."""
log = logging.getLogger("study")


def regimes_of(arm: Arm, only: str | None) -> list[str]:
    """The regimes of an arm that are asked for."""
    return [regime for regime in arm.regimes if only in (None, regime)]


def tuning_cells(name: str, arm: Arm, only: str | None) -> Iterator[Cell]:
    """The runs that choose a setting, for every regime and combination of the grid."""
    for regime in regimes_of(arm, only):
        for grid in combinations(arm.grid):
            for tuned in combinations(arm.tune):
                if tuned:
                    yield Cell(name, regime, grid, tuned, TUNING_SEED)


def measured_cells(
    name: str, arm: Arm, only: str | None, seeds: int | None, *, counts: bool = False
) -> Iterator[Cell]:
    """The runs that measure, at the settings that were chosen.

    Args:
        name: of the arm.
        arm: the arm.
        only: a regime.
        seeds: at most so many.
        counts: yield the runs whose settings are not chosen yet too, without settings.

    Raises:
        SystemExit: the arm takes its settings from one that has not searched yet.
    """
    lines = read_lines(RESULTS, arm.tuned_like or name)
    for regime in regimes_of(arm, only):
        for grid in combinations(arm.grid):
            place = (arm.tuned_like, regime, ()) if arm.tuned_like else (name, regime, grid)
            chosen = best_tuning(lines, place, read_regime(regime).get("lowest"))
            if chosen is None and arm.tuned_like and not counts:
                sys.exit(f"{name} takes its settings from {arm.tuned_like}, which has none in {regime} yet")
            for seed in range(min(arm.seeds, seeds or arm.seeds)):
                yield Cell(name, regime, grid, tuple((chosen or {}).items()), seed)


def searching_first(arms: dict[str, Arm]) -> list[tuple[str, Arm]]:
    """The arms in their order: what the others are compared with, those that search, those that borrow."""
    return sorted(arms.items(), key=lambda named: (named[1].trains, named[1].tuned_like is not None))


def quick_cells(arms: dict[str, Arm]) -> Iterator[tuple[Arm, Cell]]:
    """Every one of some arms once, on the models that ship with the package."""
    for name, arm in arms.items():
        if "large_gap" in arm.regimes:
            yield arm, Cell(name, "large_gap", next(combinations(arm.grid)), (), 0)


def run_cells(name: str, arm: Arm, cells: Iterator[Cell], until_s: float, *, waits: bool) -> None:
    """Run what is not there yet and no other process runs, until the time is up; `waits` for those others."""
    while time.monotonic() < until_s and (cell := next(cells, None)) is not None:
        run = run_of(arm, cell, WORK)
        with contextlib.suppress(Timeout), alone_at(place_of_lock(cell)).acquire(blocking=waits):
            if is_done(RESULTS, named(arm, cell, run)):
                continue
            line = timed(arm, cell, run, WORK)
            keep_line(RESULTS, line, WORK)
            log.warning("%s: accuracy %.4f, %.0f s", cell.key, line["accuracy"], line["seconds"])


def named(arm: Arm, cell: Cell, run: RunConfig) -> Line:
    """What tells whether a line is that of a run."""
    return {"arm": cell.arm, "key": cell.key, "identity": identity(run, arm, current_device())}


def timed(arm: Arm, cell: Cell, run: RunConfig, work: Path) -> Line:
    """The line of a run, with its seconds on the clock."""
    started_s = time.monotonic()
    line = measure(arm, cell, run, work)
    return line | {"seconds": round(time.monotonic() - started_s, 1)}


def place_of_lock(cell: Cell) -> Path:
    """The file, but for its ending, that who runs a cell holds."""
    return WORK / "locks" / cell.key.replace("/", ":").replace(".", "_")


def run_arm(name: str, arm: Arm, until_s: float, only: str | None, seeds: int | None) -> None:
    """The runs that choose its settings, all of them, and then those that measure."""
    for waits in (False, True):
        run_cells(name, arm, tuning_cells(name, arm, only), until_s, waits=waits)
    run_cells(name, arm, measured_cells(name, arm, only, seeds), until_s, waits=False)


def run_quick(arms: dict[str, Arm]) -> None:
    """Run every arm small and write the page of them, in a folder that is deleted."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for arm, cell in quick_cells(arms):
            line = timed(arm, cell, run_of(arm, cell, work, QUICK), work)
            keep_line(work / "results", line, work)
            log.warning("%s: accuracy %.4f, which says nothing at this size", cell.key, line["accuracy"])
        write_page(work / "results", work / "docs")
        log.warning("the page and its pictures can be written from these")


def remaining_hours(arms: dict[str, Arm], only: str | None, seeds: int | None) -> float:
    """Hours of the runs that have no line at the settings of now, by what the arm's others took.

    A run whose models are not there yet is one of them, so that none is made to count.
    """
    seconds = 0.0
    for name, arm in arms.items():
        lines = read_lines(RESULTS, name)
        keys = {line["key"] for line in lines}
        each_s = sum(line["seconds"] for line in lines) / len(lines) if lines else SECONDS_OF_A_RUN
        cells = (*tuning_cells(name, arm, only), *measured_cells(name, arm, only, seeds, counts=True))
        seconds += each_s * sum(cell.key not in keys or not is_kept(arm, cell) for cell in cells)
    return seconds / 3600


def is_kept(arm: Arm, cell: Cell) -> bool:
    """Whether a run has its line, at the settings of now and with models that are there."""
    if models.missing(WORK, cell.regime, arm.scorer):
        return False
    return is_done(RESULTS, named(arm, cell, run_of(arm, cell, WORK)))


def missing_models(arms: dict[str, Arm], only: str | None) -> list[str]:
    """The models that are made first, each once."""
    needed = {(regime, arm.scorer) for arm in arms.values() for regime in regimes_of(arm, only)}
    return sorted({name for one in needed for name in models.missing(WORK, *one)})


def main() -> None:
    """Run the arms that were requested, one after the other, with a new page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    named = sorted(path.stem for path in STUDY.glob("*.yaml"))
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", choices=named, help=", ".join(named))
    regimes = sorted(path.stem for path in (STUDY / "regimes").glob("*.yaml"))
    parser.add_argument("--regime", choices=regimes, help="this one alone")
    parser.add_argument("--seeds", type=int, help="at most so many of an arm")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="arms of every kind but TRL's, tiny, nothing kept"
    )
    asked = parser.parse_args()
    choose_device(asked.device)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    arms = read_arms(asked.only or (QUICK_ARMS if asked.quick else ()))
    if asked.quick:
        run_quick(arms)
        return
    (WORK / "locks").mkdir(parents=True, exist_ok=True)
    log.warning("about %.1f hours of one thread to go", remaining_hours(arms, asked.regime, asked.seeds))
    if missing := missing_models(arms, asked.regime):
        log.warning("made first, in time that is not counted: %s", ", ".join(missing))
    until_s = time.monotonic() + 60 * asked.minutes
    for name, arm in searching_first(arms):
        run_arm(name, arm, until_s, asked.regime, asked.seeds)
        write_page()


if __name__ == "__main__":
    main()
