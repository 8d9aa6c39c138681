"""The rows of `metrics.csv`, readable while a run writes them; nothing heavy is imported for it."""

import csv
from pathlib import Path


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole rows of a metrics file, in order; none when there is no file."""
    lines = list(csv.reader(whole_lines(path))) if path.exists() else []
    return [dict(zip(lines[0], map(float, row), strict=True)) for row in lines[1:]]


def whole_lines(path: Path) -> list[str]:
    """The lines that end; a row that is being written, or was left half written, is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
