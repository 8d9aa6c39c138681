"""The study's pictures, as SVG files from the results; needs the extra `report`.

Each ends with the hash of the rows that it was drawn from.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair
import pandas
from arms import Arm, read_regime
from summary import Line, interval, measured

from lightopd.files import write_atomically
from lightopd.schemas.base import canonical_hash

Lines = dict[str, list[Line]]
Rows = list[dict[str, Any]]
ACCURACY = altair.Scale(zero=False)


def write_pictures(folder: Path, arms: dict[str, Arm], lines: Lines) -> None:
    """Write `study-arms.svg`, `study-map.svg` and `study-drift.svg`, those that have results."""
    for name, rows in drawn_rows(arms, lines).items():
        if rows:
            drawn = io.StringIO()
            CHARTS[name](rows).properties(background="white").save(drawn, format="svg")
            signed = f"{drawn.getvalue().rstrip()}\n{signature(rows)}\n"
            write_atomically(folder / f"study-{name}.svg", signed.encode(), shared=True)


def drawn_rows(arms: dict[str, Arm], lines: Lines) -> dict[str, Rows]:
    """What each picture shows; none where it has no results."""
    return {
        "arms": list(gains(arms, lines, question=1)),
        "map": [row for row in gains(arms, lines, question=2) if row["grid"]],
        "drift": list(_drifts(arms, lines)),
    }


def signature(rows: Rows) -> str:
    """The SVG comment that tells by which rows a picture was drawn.

    Numbers count to six digits, since the last ones of an interval are the library's.
    """
    rounded = [
        {name: f"{one:.6g}" if isinstance(one, float) else one for name, one in row.items()} for row in rows
    ]
    return f"<!-- rows: {canonical_hash(rounded)} -->"


def _arms(rows: Rows) -> altair.FacetChart:
    """What the arms of the first question gain, with 95 % intervals, the best of the first regime on top."""
    rows = sorted(rows, key=lambda row: (row["regime"], -row["gain"]))
    order = list(dict.fromkeys(row["arm"] for row in rows))
    labels = altair.Axis(labelLimit=400)
    shown = pandas.DataFrame(rows).drop(columns="grid")
    base = altair.Chart(shown).encode(y=altair.Y("arm:N", sort=order, title=None, axis=labels))
    points = base.mark_point(filled=True, size=60).encode(x="gain:Q")
    bars = base.mark_rule().encode(x=altair.X("low:Q", title="points over the student"), x2="high:Q")
    return (bars + points).properties(width=300).facet(altair.Facet("regime:N", title=None), columns=2)


def gains(arms: dict[str, Arm], lines: Lines, *, question: int) -> Iterator[dict[str, Any]]:
    """Points of accuracy over the student before distillation, of every arm that trains, by regime.

    A regime whose student was not measured has none, nor has one that does not choose by accuracy.
    """
    before = {
        line["regime"]: line["accuracy"]
        for line in lines["untrained"]
        if "lowest" not in read_regime(line["regime"])
    }
    for name, arm in arms.items():
        for place, own in measured(lines[name]) if question in arm.questions and arm.trains else ():
            if place[1] not in before:
                continue
            found = interval(100 * (line["accuracy"] - before[place[1]]) for line in own)
            half = found.half_width if found.seeds > 1 else 0.0
            low, high = found.mean - half, found.mean + half
            row = {"arm": arm.title, "regime": place[1], "grid": dict(place[2])}
            yield row | {"gain": found.mean, "low": low, "high": high}


def _map(rows: Rows) -> altair.FacetChart:
    """Points of accuracy over the student before, by rollouts a step, for both losses of the map."""
    shown = pandas.DataFrame(rows).drop(columns="grid")
    shown["rollouts a step"] = [row["grid"]["train.batch_sequences"] for row in rows]
    shown["where"] = [f"{row['regime']}, learning rate {row['grid']['train.optimizer.lr']:g}" for row in rows]
    base = altair.Chart(shown).encode(
        altair.X("rollouts a step:Q", scale=altair.Scale(type="log", base=2)),
        color=altair.Color("arm:N", title=None, legend=altair.Legend(labelLimit=400)),
    )
    title = "points over the student"
    line = base.mark_line(point=True).encode(altair.Y("gain:Q", title=title))
    bars = base.mark_rule().encode(altair.Y("low:Q", title=title), y2="high:Q")
    chart = (
        (line + bars)
        .properties(width=200, height=200)
        .facet(altair.Facet("where:N", title=None, sort=list(shown["where"].unique())), columns=3)
    )
    return chart.resolve_scale(y="independent")


def _drifts(arms: dict[str, Arm], lines: Lines) -> Iterator[dict[str, Any]]:
    """Measures of drift at every kept step of the arms of the first question, seed by seed."""
    yield from (
        {"arm": arm.title, "step": point["step"], "measure": name, "value": point[name]}
        for which, arm in arms.items()
        if arm.kind == "offline" and 1 in arm.questions
        for _, own in measured(lines[which])
        for line in own
        if line["regime"] == "large_gap"
        for point in line["curve"]
        for name in ("w_mean", "ess", "log_ratio")
        if name in point
    )


def _drift(rows: Rows) -> altair.FacetChart:
    """w, ESS and the log-ratio along the training of the arms of the first question."""
    chart = altair.Chart(pandas.DataFrame(rows)).mark_line()
    chart = chart.encode(
        x="step:Q",
        y=altair.Y("mean(value):Q", title=None, scale=ACCURACY),
        color=altair.Color("arm:N", legend=altair.Legend(labelLimit=400)),
    )
    facets = chart.properties(width=180, height=160).facet(altair.Facet("measure:N", title=None))
    return facets.resolve_scale(y="independent")


CHARTS: dict[str, Callable[[Rows], altair.FacetChart]] = {"arms": _arms, "map": _map, "drift": _drift}
"""How each picture is drawn from its rows."""
