"""The study's pictures, as SVG files from the results; needs the extra `report`.

Each ends with the hash of the rows that it was drawn from.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair
import pandas
from arms import Arm, last_parts
from summary import Line, accuracies_before, interval, measured

from lightopd.files import write_atomically
from lightopd.schemas.base import canonical_hash

Lines = dict[str, list[Line]]
Rows = list[dict[str, Any]]
ACCURACY = altair.Scale(zero=False)
OF_DRIFT = {"w_mean": "w", "ess": "ESS", "chi2": "χ²", "log_ratio": "log ratio, nats"}
OF_GRADIENT = {"gap": "gradient gap", "bound": "bound of Theorem 3.5"}


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
        "arms": list(gains(arms, lines)),
        "map": list(_map_rows(arms, lines)),
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
    """What the arms of the first question gain, with 95 % intervals, the best of the large gap on top."""
    rows = sorted(rows, key=lambda row: (row["regime"] != "large_gap", row["regime"], -row["gain"]))
    order = list(dict.fromkeys(row["arm"] for row in rows))
    labels = altair.Axis(labelLimit=400)
    base = altair.Chart(pandas.DataFrame(rows)).encode(
        y=altair.Y("arm:N", sort=order, title=None, axis=labels)
    )
    points = base.mark_point(filled=True, size=60).encode(x="gain:Q")
    bars = base.mark_rule().encode(x=altair.X("low:Q", title="points over the student"), x2="high:Q")
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    facet = altair.Facet("regime:N", title=None, sort=regimes)
    return (bars + points).properties(width=300).facet(facet, columns=2)


def gains(arms: dict[str, Arm], lines: Lines) -> Iterator[dict[str, Any]]:
    """Points of accuracy over the student before, of the first question's arms that train, by regime.

    A regime whose student was not measured has none, nor has one that does not choose by accuracy.
    """
    before = accuracies_before(lines["untrained"])
    for name, arm in arms.items():
        for place, own in measured(lines[name]) if 1 in arm.questions and arm.trains else ():
            if place[1] in before:
                found = interval(100 * (line["accuracy"] - before[place[1]]) for line in own)
                low, high = found.ends
                row = {"arm": arm.title, "regime": place[1]}
                yield row | {"gain": found.mean, "low": low, "high": high}


def _map_rows(arms: dict[str, Arm], lines: Lines) -> Iterator[dict[str, Any]]:
    """Accuracy, KL to the teacher and drift of the last step at every point of the map, with intervals."""
    before = accuracies_before(lines["untrained"])
    for name in (name for name, arm in arms.items() if 2 in arm.questions):
        for (_, regime, grid), own in measured(lines[name]):
            if regime not in before:
                continue
            last = [line["curve"][-1] for line in own]
            values = {
                "points over the student": [100 * (line["accuracy"] - before[regime]) for line in own],
                "KL, nats": [line["reverse_kl_nats"] for line in own],
                "ESS": [point["ess"] for point in last],
                "w": [point["w_mean"] for point in last],
            }
            for measure, each in values.items():
                found = interval(each)
                low, high = found.ends
                row = {
                    "arm": arms[name].title,
                    "regime": regime,
                    **last_parts(dict(grid)),
                    "measure": measure,
                }
                yield row | {"value": found.mean, "low": low, "high": high}


def _map(rows: Rows) -> altair.VConcatChart:
    """The map by rollouts a step: a column for each learning rate, a row for each measure."""
    regimes = dict.fromkeys(row["regime"] for row in rows)
    return altair.vconcat(*(_map_of([row for row in rows if row["regime"] == one], one) for one in regimes))


def _map_of(rows: Rows, regime: str) -> altair.FacetChart:
    shown = pandas.DataFrame(rows).drop(columns="regime").rename(columns={"lr": "learning rate"})
    base = altair.Chart(shown).encode(
        altair.X(
            "batch_sequences:Q",
            title="rollouts a step",
            scale=altair.Scale(type="log", base=2, domain=[48, 2800]),
            axis=altair.Axis(values=[64, 512, 2048]),
        ),
        color=altair.Color("arm:N", title=None, legend=altair.Legend(labelLimit=400, orient="bottom")),
    )
    line = base.mark_line(point=True).encode(altair.Y("value:Q", title=None, scale=ACCURACY))
    bars = base.mark_rule().encode(altair.Y("low:Q", title=None), y2="high:Q")
    order = list(dict.fromkeys(row["measure"] for row in rows))
    chart = (
        (line + bars)
        .properties(width=170, height=110)
        .facet(
            row=altair.Row("measure:N", title=None, sort=order),
            column=altair.Column("learning rate:O", title=regime),
        )
    )
    return chart.resolve_scale(y="independent")


def _drifts(arms: dict[str, Arm], lines: Lines) -> Iterator[dict[str, Any]]:
    """Measures of drift at every kept step of the arms of the first question, and of the gradient."""
    trained = {name: arm for name, arm in arms.items() if arm.kind == "offline" and arm.questions[0] == 1}
    for which, arm in trained.items():
        points = [point for line in in_the_large_gap(lines[which]) for point in line["curve"]]
        for point in points:
            for name, title in OF_DRIFT.items():
                if name in point:
                    yield {"arm": arm.title, "step": point["step"], "measure": title, "value": point[name]}
    titles = {arm.method: arm.title for arm in trained.values() if not arm.grid}
    for which in (name for name, arm in arms.items() if "gradient_gap" in arm.measures):
        for line in in_the_large_gap(lines[which]):
            row = {"arm": titles[arms[which].method], "step": line["grid"]["train.steps"]}
            for name, title in OF_GRADIENT.items():
                yield row | {"measure": title, "value": line[name]}


def in_the_large_gap(lines: list[Line]) -> list[Line]:
    """The measured runs of the regime whose drift is drawn."""
    return [line for place, own in measured(lines) if place[1] == "large_gap" for line in own]


def _drift(rows: Rows) -> altair.FacetChart:
    """w, ESS, χ² and the log ratio along training; the gradient gap and its bound at three moments."""
    chart = altair.Chart(pandas.DataFrame(rows)).mark_line(point=altair.OverlayMarkDef(size=12))
    chart = chart.encode(
        x="step:Q",
        y=altair.Y("mean(value):Q", title=None, scale=ACCURACY),
        color=altair.Color(
            "arm:N", title=None, legend=altair.Legend(labelLimit=400, orient="bottom", columns=2)
        ),
    )
    order = list(dict.fromkeys(row["measure"] for row in rows))
    facets = chart.properties(width=200, height=150).facet(
        altair.Facet("measure:N", title=None, sort=order), columns=3
    )
    return facets.resolve_scale(y="independent", x="independent")


CHARTS: dict[str, Callable[[Rows], altair.FacetChart | altair.VConcatChart]] = {
    "arms": _arms,
    "map": _map,
    "drift": _drift,
}
"""How each picture is drawn from its rows."""
