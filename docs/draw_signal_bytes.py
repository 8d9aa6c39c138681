"""Draws docs/images/signal-bytes.svg from docs/decisions/0012-bytes.json; needs the extra `report`.

python docs/draw_signal_bytes.py
"""

import json
from pathlib import Path

import altair
import pandas

DOCS = Path(__file__).parent
LINES = {
    "float16": ("float16", "kl_shaped"),
    "float16, tail spread evenly": ("float16", "kl_uniform"),
    "eighths of a nat": ("eighths", "kl_shaped"),
    "quarters of a nat": ("quarters", "kl_shaped"),
    "candidate: gaps of codes": ("quarters, by frequency, gaps", "kl_shaped"),
    "candidate: entropy coder": ("quarters, entropy coder", "kl_shaped"),
}
COLORS = ["#7f7f7f", "#c7c7c7", "#1f77b4", "#2ca02c", "#ffbb78", "#d62728"]


def points() -> pandas.DataFrame:
    """One row for each encoding and threshold."""
    supports = json.loads((DOCS / "decisions" / "0012-bytes.json").read_text())["smollm2"]["supports"]
    rows = [
        {"kept as": line, "bytes": found["encodings"][way]["bytes"], "nats": found["encodings"][way][kl]}
        for line, (way, kl) in LINES.items()
        for support, found in supports.items()
        if support.startswith("p >") and way in found["encodings"]
    ]
    return pandas.DataFrame(rows)


def main() -> None:
    """Write the picture."""
    axis_x = altair.X(
        "bytes:Q", title="bytes per token on disk", scale=altair.Scale(type="log", domain=[30, 340])
    )
    axis_y = altair.Y(
        "nats:Q", title="KL of the teacher lost, nats per token", scale=altair.Scale(type="log")
    )
    color = altair.Color("kept as:N", sort=list(LINES), scale=altair.Scale(domain=list(LINES), range=COLORS))
    chart = altair.Chart(points()).mark_line(point=True).encode(axis_x, axis_y, color)
    chart = chart.properties(width=520, height=320, background="white")
    chart.save(str(DOCS / "images" / "signal-bytes.svg"))


if __name__ == "__main__":
    main()
