"""What a stage says when it ends: counts, figures, and everything that was dropped and why."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from lightopd.files import write_atomically
from lightopd.ranks import is_main
from lightopd.schemas.manifest import Override
from lightopd.telling import called


@dataclass(frozen=True, slots=True)
class Report:
    """The end of a stage, on screen and as `<stage>.report.json` beside its output."""

    stage: str
    out: str
    """Folder of what the stage made."""
    figures: dict[str, JsonValue]
    """Counts and measurements, units in the names."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    notes: tuple[str, ...] = ()
    """Sentences the reader must not miss: overrides, differences, verdicts."""
    seconds: float = 0.0
    rows: tuple[dict[str, JsonValue], ...] = ()
    """A table, such as one row for each round; every row has the same keys."""
    made_from: str | None = None
    """Hash of what the figures follow from; a stage that finds its report under the same one is done."""

    def as_json(self) -> str:
        """The report as one JSON object, of folders by their names."""
        return called(json.dumps(asdict(self), ensure_ascii=False))


def save_report(report: Report, folder: Path) -> None:
    """Write `<stage>.report.json` into the folder."""
    if is_main():
        path = folder / f"{report.stage}.report.json"
        write_atomically(path, (report.as_json() + "\n").encode(), shared=True)


def finished_report(stage: str, folder: Path, made_from: str) -> Report | None:
    """The report that a finished stage left, if it was made from the same; None otherwise."""
    path = folder / f"{stage}.report.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, or half written by a killed run
        return None
    return report_of(plain) if plain.get("made_from") == made_from else None


def report_of(plain: dict[str, Any]) -> Report:
    """A report from what its `as_json` was read as."""
    return Report(**{**plain, "notes": tuple(plain["notes"]), "rows": tuple(plain["rows"])})


def override_notes(overrides: Sequence[Override]) -> tuple[str, ...]:
    """One sentence for each refusal that was set aside, here or in an ancestor; none twice."""
    return tuple(dict.fromkeys(f"overridden: {o.allowed} in {o.stage} ({o.found})" for o in overrides))
