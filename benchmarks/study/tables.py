"""The tables of docs/study.md: a row for each place of the results, and how each column is filled."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import mean

from arms import Arm, last_parts
from summary import Interval, Line, Place, interval

Cell = Callable[[Place, list[Line]], str]
Column = tuple[str, Cell]
Places = list[tuple[Place, list[Line]]]


def best_first(places: Places) -> Places:
    """By accuracy, highest first."""
    return sorted(places, key=lambda one: -mean(line["accuracy"] for line in one[1]))


def table(columns: tuple[Column, ...], places: Places, arms: dict[str, Arm]) -> str:
    """One row for each place, named by its arm and its combination of the grid."""
    rows = []
    for place, own in places:
        grid = ", ".join(f"{name} {value:g}" for name, value in last_parts(dict(place[2])).items())
        name = f"{arms[place[0]].title}{': ' if grid else ''}{grid} (`{place[0]}`)"
        rows.append([name, *(cell(place, own) for _, cell in columns)])
    return joined(["arm", *(title for title, _ in columns)], rows)


def over_seeds(name: str, digits: int = 4) -> Cell:
    """A cell with the mean and interval of one figure."""
    return cell_of(name, lambda values: shown(interval(values), digits))


def mean_of(name: str, digits: int) -> Cell:
    """A cell with the mean of one figure."""
    return cell_of(name, lambda values: f"{mean(values):,.{digits}f}")


def cell_of(name: str, show: Callable[[list[float]], str]) -> Cell:
    """A cell that shows one figure of the lines that have it; empty where none has."""

    def cell(_place: Place, lines: list[Line]) -> str:
        values = [line[name] for line in lines if line.get(name) is not None]
        return show(values) if values else ""

    return cell


def shown(found: Interval, digits: int) -> str:
    """A mean with its interval, and its seeds where these are not five."""
    return f"{found:.{digits}f}" + ("" if found.seeds == 5 else f" ({found.seeds})")


def rate(_place: Place, lines: list[Line]) -> str:
    """The learning rate that the arm's search chose, or that its combination has."""
    rates = {
        value
        for line in lines
        for name, value in (line["tuned"] | line["grid"]).items()
        if name.endswith(".lr")
    }
    return ", ".join(f"{one:g}" for one in sorted(rates))


def to_the_student(_place: Place, lines: list[Line]) -> str:
    """Seconds of a core from the SFT student to the trained one: sampling, scoring and training."""
    parts = ("rollout_seconds", "score_seconds", "train_seconds")
    values = [sum(line.get(part, 0.0) for part in parts) for line in lines if "train_seconds" in line]
    return shown(interval(values), 0) if values else ""


ACCURACY: Column = ("accuracy", over_seeds("accuracy"))
GREEDY: Column = ("greedily", over_seeds("greedy_accuracy"))
KL: Column = ("KL(student, teacher), nats", over_seeds("reverse_kl_nats", 3))
RATE: Column = ("learning rate", rate)
OF_ACCURACY = (RATE, ACCURACY, GREEDY, KL)
COLUMNS: dict[int, tuple[Column, ...]] = {
    1: OF_ACCURACY,
    3: (
        ACCURACY,
        ("seconds to sample", mean_of("rollout_seconds", 1)),
        ("to score", mean_of("score_seconds", 1)),
        ("to train", mean_of("train_seconds", 1)),
        ("in all", to_the_student),
        ("tokens sampled", mean_of("response_tokens", 0)),
    ),
    4: OF_ACCURACY,
    5: OF_ACCURACY,
    6: (
        RATE,
        ("w", over_seeds("w_mean", 3)),
        ("ESS", over_seeds("ess", 3)),
        ("log ratio, nats", over_seeds("log_ratio", 3)),
        ("χ²", over_seeds("chi2", 3)),
        ("gradient", over_seeds("gradient", 3)),
        ("gap to it", over_seeds("gap", 3)),
        ("bound of Theorem 3.5", over_seeds("bound", 1)),
    ),
    7: (RATE, ACCURACY, KL, ("KL to the teacher scaled", over_seeds("extrapolated_kl_nats", 3))),
    8: (
        RATE,
        ACCURACY,
        KL,
        ("bytes a token", mean_of("bytes_per_token", 1)),
        ("seconds to score", mean_of("score_seconds", 1)),
    ),
    9: (RATE, ACCURACY, KL),
}


def map_table(places: Places) -> str:
    """Accuracy of a loss over rollouts a step, learning rate and steps, with drift and KL beside."""
    places = sorted(places, key=lambda one: [value for _, value in one[0][2]])
    points = [point for _, own in places for line in own for point in line["curve"]]
    steps = sorted({point["step"] for point in points if "avg_at_k" in point})
    columns = (
        *((f"step {step:.0f}", at_step(step, "avg_at_k")) for step in steps),
        KL,
        ("w", at_step(steps[-1], "w_mean")),
        ("ESS", at_step(steps[-1], "ess")),
        ("gap, nats", mean_of("gap_nats", 3)),
    )
    head = ["rollouts a step", "learning rate", *(name for name, _ in columns)]
    rows = [
        [*(f"{value:g}" for _, value in place[2]), *(cell(place, own) for _, cell in columns)]
        for place, own in places
    ]
    return joined(head, rows)


def joined(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def at_step(step: float, name: str) -> Cell:
    """A cell with one figure of the curves at a step."""

    def cell(_place: Place, lines: list[Line]) -> str:
        curves = [point for line in lines for point in line["curve"] if point["step"] == step]
        values = [point[name] for point in curves if name in point]
        return shown(interval(values), 3) if values else ""

    return cell


OVERLAPS = (0.0, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
"""Edges of the table of overlaps, half open; one that rounds above 1 counts as 1."""
LOSSES = {"log_ratio": "losses on sampled tokens", "divergence": "divergences on the top-k"}


def overlap_table(runs: Iterable[tuple[str, float, float]]) -> str:
    """How much runs gained by the overlap that they ended with.

    Args:
        runs: of each one the kind of its target, its overlap at the last step, and the points gained.
    """
    found: dict[tuple[str, float], list[float]] = {}
    for kind, overlap, points in runs:
        low = max(edge for edge in OVERLAPS[:-1] if edge <= max(overlap, 0.0))
        found.setdefault((kind, low), []).append(points)
    rows = []
    for low, high in pairwise(OVERLAPS):
        cells = [in_short(found.get((kind, low), [])) for kind in LOSSES]
        rows.append([f"{low:g} to {high:g}", *(one for cell in cells for one in cell)])
    head = [cell for title in LOSSES.values() for cell in ("runs", f"{title}: points")]
    return joined(["overlap at the end", *head], rows)


def in_short(points: list[float]) -> tuple[str, str]:
    """Their number, and mean, lowest and highest."""
    if not points:
        return "0", ""
    return str(len(points)), f"{mean(points):+.1f} ({min(points):+.1f} to {max(points):+.1f})"
