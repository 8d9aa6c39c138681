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


def write_pictures(folder: Path, arms: dict[str, Arm], lines: Lines) -> None:
    """Write `study-arms.svg`, `study-map.svg` and `study-drift.svg`, those that have results."""
    drawn = {"arms": _arms(arms, lines), "map": _map(arms, lines), "drift": _drift(arms, lines)}
    for name, chart in drawn.items():
        if chart is not None:
            chart.properties(background="white").save(str(folder / f"study-{name}.svg"))


def _arms(arms: dict[str, Arm], lines: Lines) -> altair.FacetChart | None:
    """What the arms of the first question gain, with 95 % intervals, the best of the first regime on top."""
    rows = sorted(_gains(arms, lines, question=1), key=lambda row: (row["regime"], -row["gain"]))
    if not rows:
        return None
    order = list(dict.fromkeys(row["arm"] for row in rows))
    labels = altair.Axis(labelLimit=400)
    shown = pandas.DataFrame(rows).drop(columns="grid")
    base = altair.Chart(shown).encode(y=altair.Y("arm:N", sort=order, title=None, axis=labels))
    points = base.mark_point(filled=True, size=60).encode(x="gain:Q")
    bars = base.mark_rule().encode(x=altair.X("low:Q", title="points over the student"), x2="high:Q")
    return (bars + points).properties(width=300).facet(column=altair.Column("regime:N", title=None))


def _gains(arms: dict[str, Arm], lines: Lines, *, question: int) -> Iterator[dict[str, Any]]:
    """Points of accuracy over the student before distillation, of every arm that trains, by regime."""
    before = {line["regime"]: line["accuracy"] for line in lines["untrained"]}
    for name, arm in arms.items():
        for place, own in measured(lines[name]) if question in arm.questions and arm.trains else ():
            found = interval(100 * (line["accuracy"] - before[place[1]]) for line in own)
            half = found.half_width if found.seeds > 1 else 0.0
            low, high = found.mean - half, found.mean + half
            row = {"arm": arm.title, "regime": place[1], "grid": dict(place[2])}
            yield row | {"gain": found.mean, "low": low, "high": high}


def _map(arms: dict[str, Arm], lines: Lines) -> altair.FacetChart | None:
    """Points of accuracy over the student before, by rollouts a step, for both losses of the map."""
    rows = [row for row in _gains(arms, lines, question=2) if row["grid"]]
    if not rows:
        return None
    for row in rows:
        row |= {"rollouts a step": row["grid"]["train.batch_sequences"]}
        row |= {"where": f"{row['regime']}, learning rate {row['grid']['train.optimizer.lr']:g}"}
        del row["grid"]
    order = dict.fromkeys(row["where"] for row in rows)
    base = altair.Chart(pandas.DataFrame(rows)).encode(
        altair.X("rollouts a step:Q", scale=altair.Scale(type="log", base=2)),
        color=altair.Color("arm:N", title=None, legend=altair.Legend(labelLimit=400)),
    )
    title = "points over the student"
    line = base.mark_line(point=True).encode(altair.Y("gain:Q", title=title))
    bars = base.mark_rule().encode(altair.Y("low:Q", title=title), y2="high:Q")
    chart = (
        (line + bars)
        .properties(width=200, height=200)
        .facet(altair.Facet("where:N", title=None, sort=list(order)), columns=3)
    )
    return chart.resolve_scale(y="independent")


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
