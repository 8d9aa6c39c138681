"""The study's pictures, as SVG files from the results; needs the extra `report`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair
import pandas
from arms import Arm
from summary import Line, interval, measured

Lines = dict[str, list[Line]]
ACCURACY = altair.Scale(zero=False)
NUM_COLUMNS = 3


def write_pictures(folder: Path, arms: dict[str, Arm], lines: Lines) -> None:
    """Write `study-arms.svg`, `study-map.svg` and `study-drift.svg`, those that have results."""
    drawn = {"arms": _arms(arms, lines), "map": _map(lines["map"]), "drift": _drift(arms, lines)}
    for name, chart in drawn.items():
        if chart is not None:
            chart.properties(background="white").save(str(folder / f"study-{name}.svg"))


def _arms(arms: dict[str, Arm], lines: Lines) -> altair.FacetChart | None:
    """What the arms of the first question gain, with 95 % intervals, the best of the first regime on top."""
    rows = sorted(_gains(arms, lines), key=lambda row: (row["regime"], -row["gain"]))
    if not rows:
        return None
    order = list(dict.fromkeys(row["arm"] for row in rows))
    labels = altair.Axis(labelLimit=400)
    base = altair.Chart(pandas.DataFrame(rows)).encode(
        y=altair.Y("arm:N", sort=order, title=None, axis=labels)
    )
    points = base.mark_point(filled=True, size=60).encode(x="gain:Q")
    bars = base.mark_rule().encode(x=altair.X("low:Q", title="points over the student"), x2="high:Q")
    return (bars + points).properties(width=300).facet(column=altair.Column("regime:N", title=None))


def _gains(arms: dict[str, Arm], lines: Lines) -> Iterator[dict[str, Any]]:
    """Points of accuracy over the student before distillation, of every arm that trains, by regime."""
    before = {line["regime"]: line["accuracy"] for line in lines["untrained"]}
    for name, arm in arms.items():
        for place, own in measured(lines[name]) if 1 in arm.questions and arm.kind != "untrained" else ():
            found = interval(100 * (line["accuracy"] - before[place[1]]) for line in own)
            half = found.half_width if found.seeds > 1 else 0.0
            low, high = found.mean - half, found.mean + half
            yield {"arm": arm.title, "regime": place[1], "gain": found.mean, "low": low, "high": high}


def _map(lines: list[Line]) -> altair.FacetChart | None:
    """Accuracy of the plain loss along its steps, a picture for each number of rollouts a step."""
    rows = [
        {
            "regime and rollouts a step": f"{line['regime']}, {line['grid']['train.batch_sequences']:,}",
            "learning rate": f"{line['grid']['train.optimizer.lr']:g}",
            "step": point["step"],
            "accuracy": point["avg_at_k"],
        }
        for _, own in measured(lines)
        for line in own
        for point in line["curve"]
        if "avg_at_k" in point
    ]
    if not rows:
        return None
    chart = altair.Chart(pandas.DataFrame(rows)).mark_line(point=True)
    chart = chart.encode(
        altair.X("step:Q"),
        altair.Y("mean(accuracy):Q", title="accuracy", scale=ACCURACY),
        color="learning rate:N",
    )
    facet = altair.Facet("regime and rollouts a step:N", columns=NUM_COLUMNS, title=None)
    return chart.properties(width=180, height=160).facet(facet)


def _drift(arms: dict[str, Arm], lines: Lines) -> altair.FacetChart | None:
    """w, ESS and the log-ratio along the training of the arms of the first question."""
    rows = [
        {"arm": arm.title, "step": point["step"], "measure": name, "value": point[name]}
        for which, arm in arms.items()
        if arm.kind == "offline" and 1 in arm.questions
        for _, own in measured(lines[which])
        for line in own
        if line["regime"] == "large_gap"
        for point in line["curve"]
        for name in ("w_mean", "ess", "log_ratio")
        if name in point
    ]
    if not rows:
        return None
    chart = altair.Chart(pandas.DataFrame(rows)).mark_line()
    chart = chart.encode(
        x="step:Q",
        y=altair.Y("mean(value):Q", title=None, scale=ACCURACY),
        color=altair.Color("arm:N", legend=altair.Legend(labelLimit=400)),
    )
    facets = chart.properties(width=180, height=160).facet(altair.Facet("measure:N", title=None))
    return facets.resolve_scale(y="independent")
