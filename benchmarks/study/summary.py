"""The lines of the runs, and what is said of an arm: chosen settings, means and intervals over seeds."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from arms import last_parts, read_regime
from filelock import FileLock
from scipy.stats import t as student_t
from scipy.stats import ttest_rel

from lightopd.files import write_atomically

Line = dict[str, Any]
Place = tuple[str, str, tuple[tuple[str, Any], ...]]
"""Arm, regime and combination of the grid."""


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval."""

    mean: float
    half_width: float
    """NaN for one seed."""
    seeds: int

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value; both the mean for one seed."""
        half = self.half_width if self.seeds > 1 else 0.0
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        return f"{self:.4f}"

    def __format__(self, spec: str) -> str:
        """Both numbers in the format of one; a sign is the mean's alone."""
        half = f" ± {self.half_width:{spec.lstrip('+')}}" if self.seeds > 1 else ""
        return f"{self.mean:{spec}}{half}"


def read_lines(results: Path, name: str) -> list[Line]:
    """The finished runs of an arm, in all regimes."""
    files = sorted(results.glob(f"*/{name}.jsonl"))
    return [json.loads(row) for path in files for row in path.read_text().splitlines()]


def is_done(results: Path, line: Line) -> bool:
    """Whether a run has its line, at the settings of now."""
    found = read_lines(results, line["arm"])
    return any(one["key"] == line["key"] and one["identity"] == line["identity"] for one in found)


def keep_line(results: Path, line: Line, work: Path) -> None:
    """Put a line in the place of an older one, or at the end; processes that share `work` take turns."""
    path = results / line["regime"] / f"{line['arm']}.jsonl"
    with alone_at(work / "results"):
        mine = [one for one in read_lines(results, line["arm"]) if one["regime"] == line["regime"]]
        lines = {slot(one): one for one in (*mine, line)}
        write_atomically(path, "".join(json.dumps(one) + "\n" for one in lines.values()).encode())


def slot(line: Line) -> str:
    """What a regime has one line of: a measured run at the setting that was chosen last, or a tuning run."""
    return line["key"] if line["is_tuning"] else json.dumps([line["grid"], line["seed"]])


def alone_at(place: Path) -> FileLock:
    """A lock on what is made at a place; another process waits until it is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(place.with_suffix(".lock"))


def interval(values: Iterable[float]) -> Interval:
    """Mean and half-width of the 95 % interval of Student's t over the seeds' values."""
    found = list(values)
    if len(found) < 2:
        return Interval(found[0], math.nan, len(found))
    width = student_t.ppf(0.975, len(found) - 1) * stdev(found) / math.sqrt(len(found))
    return Interval(mean(found), float(width), len(found))


def place_of(line: Line) -> Place:
    """Where a line belongs."""
    return line["arm"], line["regime"], tuple(line["grid"].items())


def measured(lines: Iterable[Line]) -> Iterator[tuple[Place, list[Line]]]:
    """The lines of every place at the setting that was chosen for it, the tuning runs left out."""
    found: dict[Place, list[Line]] = {}
    for line in lines:
        if not line["is_tuning"]:
            found.setdefault(place_of(line), []).append(line)
    yield from found.items()


def accuracies_before(lines: Iterable[Line]) -> dict[str, float]:
    """Accuracy before distillation, from the lines of `untrained`, of the regimes that choose by it."""
    return {line["regime"]: line["accuracy"] for line in lines if "lowest" not in read_regime(line["regime"])}


def best_tuning(lines: Iterable[Line], place: Place, lowest: str | None = None) -> dict[str, Any] | None:
    """The tuned settings of the best run on the validation prompts, the lowest of equals, if any ran.

    Args:
        lines: of the arm.
        place: where it searched.
        lowest: the figure whose lowest is the best; None takes the highest accuracy.
    """
    tried = [line for line in lines if line["is_tuning"] and place_of(line) == place]
    worth = (lambda line: -line[lowest]) if lowest else (lambda line: line["accuracy"])
    by_setting = sorted(tried, key=lambda line: list(line["tuned"].values()))
    return max(by_setting, key=worth)["tuned"] if tried else None


NOT_MEASURED = "(not measured)"


def figures(results: Path, regime: str) -> dict[str, Callable[..., str]]:
    """What a text says of arms, by name: means, gains, p values and what a search found, read from the lines.

    Each takes an arm, a regime that may be left out, and values of the arm's grid by the last part of their
    names. What has no lines is `NOT_MEASURED`.

    Args:
        results: folder of the lines.
        regime: taken where a text names none.
    """

    def lines(arm: str, regime: str = regime, **grid: float) -> dict[int, Line]:
        own = [
            line for line in read_lines(results, arm) if line["regime"] == regime and not line["is_tuning"]
        ]
        short = {line["seed"]: line for line in own if grid.items() <= last_parts(line["grid"]).items()}
        return dict(sorted(short.items()))

    def figure(arm: str, of: str = "accuracy", digits: int = 4, **where: Any) -> str:
        values = [line[of] for line in lines(arm, **where).values() if of in line]
        return f"{interval(values):.{digits}f}" if values else NOT_MEASURED

    def gain(arm: str, regime: str = regime, **grid: float) -> str:
        before, own = lines("untrained", regime), lines(arm, regime, **grid)
        if not before or not own:
            return NOT_MEASURED
        found = interval(100 * (line["accuracy"] - before[0]["accuracy"]) for line in own.values())
        return f"{found:+.1f}"

    def p(one: str, other: str, of: str = "accuracy", **where: Any) -> str:
        first, second = lines(one, **where), lines(other, **where)
        seeds = sorted(first.keys() & second.keys())
        if len(seeds) < 2:
            return NOT_MEASURED
        value = ttest_rel([first[at][of] for at in seeds], [second[at][of] for at in seeds]).pvalue
        return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")

    def searched(arm: str, rate: float, regime: str = regime, of: str = "accuracy") -> str:
        tried = [line for line in read_lines(results, arm) if line["is_tuning"] and line["regime"] == regime]
        found = [line[of] for line in tried if rate in line["tuned"].values()]
        return f"{found[0]:.4f}" if found else NOT_MEASURED

    return {"figure": figure, "gain": gain, "p": p, "searched": searched}
