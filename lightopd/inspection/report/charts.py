"""The charts of a report, drawn by Altair and turned into SVG on this machine; no script, no network.

Colours are CSS variables of the page, so that one drawing serves light and dark. Every mark carries
its numbers as an `aria-label`, which the page shows under the pointer.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightopd.errors import ConfigError

WIDTH, HEIGHT = 420, 200
SERIES = [f"var(--series-{number})" for number in range(1, 7)]
"""Okabe and Ito's colours, which colour-blind readers can tell apart; the page defines them."""
INK, LINE, LIMIT = "var(--ink)", "var(--line)", "var(--alert)"

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Chart:
    """One drawing of the page."""

    title: str
    svg: str
    caption: str = ""


def altair() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import altair as library
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the report's charts need {error.name}, which is not installed; pip install 'lightopd[report]'"
        ) from None
    return library


def histogram(
    title: str, rows: Records, x: str, caption: str = "", by: str = "series", count: str = "tokens"
) -> Chart:
    """Bars from `from` to `to`: rollouts stacked by `by`; tokens on a log scale, side by side."""
    alt = altair()
    is_log = count == "tokens"
    chart = _base(rows).mark_bar(binSpacing=1, opacity=0.65 if is_log else 1)
    chart = chart.encode(
        x=alt.X("from:Q", title=x, bin="binned"),
        x2="to:Q",
        y=alt.Y(
            "count:Q",
            title=f"{count} (log)" if is_log else count,
            stack=not is_log,
            scale=alt.Scale(type="symlog" if is_log else "linear"),
            axis=alt.Axis(values=[0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8] if is_log else alt.Undefined),
        ),
        color=_colour(by, rows),
    )
    return _drawn(title, chart, caption)


def bars(title: str, rows: Records, label: str, value: str, unit: str, caption: str = "") -> Chart:
    """One horizontal bar for each row, with its number."""
    alt = altair()
    y = alt.Y(f"{label}:N", title=None, sort=None)
    bar = _base(rows).mark_bar(color=SERIES[0]).encode(x=alt.X(f"{value}:Q", title=unit), y=y)
    text = (
        _base(rows)
        .mark_text(align="left", dx=4, color=INK)
        .encode(x=f"{value}:Q", y=y, text=alt.Text(f"{value}:Q", format=".4~g"))
    )
    return _drawn(title, alt.layer(bar, text), caption, height=max(40, 26 * len(rows)))


def bands(title: str, rows: Records, y: str, caption: str = "") -> Chart:
    """Quartile band, median line and dashed mean over the position."""
    alt = altair()
    x = alt.X("pos:Q", title="position in the response")
    band = (
        _base(rows)
        .mark_area(opacity=0.3)
        .encode(x=x, y=alt.Y("low:Q", title=y), y2="high:Q", color=_colour("series", rows))
    )
    middle = _base(rows).mark_line(strokeWidth=2).encode(x=x, y="middle:Q", color=_colour("series", rows))
    mean = _base(rows).mark_line(strokeDash=[4, 3]).encode(x=x, y="mean:Q", color=_colour("series", rows))
    return _drawn(title, alt.layer(band, middle, mean), caption)


def curves(title: str, rows: Records, y: str, limits: Mapping[str, float], caption: str = "") -> Chart:
    """A line for each run over the steps, and a dashed rule for each limit."""
    alt = altair()
    lines = (
        _base(rows)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False)),
            color=_colour("run", rows),
        )
    )
    layers = [lines]
    for name, value in limits.items():
        rule = _base([{"value": value, "limit": f"{name} {value:g}"}])
        layers.append(rule.mark_rule(strokeDash=[6, 4], color=LIMIT).encode(y="value:Q"))
        layers.append(
            rule.mark_text(align="right", dy=-5, color=LIMIT).encode(
                x=alt.value(WIDTH - 4), y="value:Q", text="limit:N"
            )
        )
    return _drawn(title, alt.layer(*layers), caption)


def accuracies(title: str, rows: Records, caption: str = "") -> Chart:
    """Points with a bar of one standard error, by evaluation and run."""
    alt = altair()
    y = alt.Y("name:N", title=None, sort=["before", "after", "teacher"])
    error = (
        _base(rows)
        .mark_rule()
        .encode(x="low:Q", x2="high:Q", y=y, color=_colour("run", rows), yOffset="run:N")
    )
    point = (
        _base(rows)
        .mark_point(filled=True, size=70)
        .encode(
            x=alt.X("accuracy:Q", title="avg@k", scale=alt.Scale(zero=False)),
            y=y,
            yOffset="run:N",
            color=_colour("run", rows),
        )
    )
    text = (
        _base(rows)
        .mark_text(align="left", dx=8, dy=-9, color=INK)
        .encode(x="accuracy:Q", y=y, yOffset="run:N", text=alt.Text("accuracy:Q", format=".3f"))
    )
    return _drawn(title, alt.layer(error, point, text), caption, height=max(90, 34 * len(rows)))


def _base(rows: Records) -> Any:
    return altair().Chart(altair().Data(values=[dict(row) for row in rows]))


def _colour(field: str, rows: Records) -> Any:
    alt = altair()
    names = list(dict.fromkeys(str(row[field]) for row in rows))
    scale = alt.Scale(domain=names, range=[SERIES[place % len(SERIES)] for place in range(len(names))])
    legend = alt.Legend(title=None, orient="top") if len(names) > 1 else None
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def _drawn(title: str, chart: Any, caption: str, height: int = HEIGHT) -> Chart:
    import vl_convert

    chart = chart.properties(width=WIDTH, height=height, background="transparent")
    text = {"labelColor": INK, "titleColor": INK, "labelFont": "sans-serif", "titleFont": "sans-serif"}
    chart = chart.configure_axis(
        **text, gridColor=LINE, domainColor=LINE, tickColor=LINE, titleFontWeight="normal"
    )
    chart = chart.configure_legend(labelColor=INK, titleColor=INK, labelFont="sans-serif", labelLimit=260)
    chart = chart.configure_view(stroke=None)
    return Chart(title, safe_svg(vl_convert.vegalite_to_svg(chart.to_json())), caption)


def safe_svg(svg: str) -> str:
    """The drawing, once it is certain that nothing in it can run or load.

    Raises:
        ValueError: it holds a script, a handler, a link or something foreign.
    """
    root = ET.fromstring(svg)
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        if name not in _DRAWING:
            raise ValueError(f"a chart holds <{name}>")
        for key in element.attrib:
            if key.lower().startswith("on") or key.rpartition("}")[2] == "href":
                raise ValueError(f"a chart holds the attribute {key}")
    return re.sub(r"^<svg ", '<svg role="img" ', svg, count=1)


_DRAWING = {
    "svg",
    "g",
    "path",
    "rect",
    "line",
    "text",
    "tspan",
    "circle",
    "defs",
    "clipPath",
    "style",
    "title",
    "desc",
}
