"""What two runs of one command must have in common: every file, and every byte that tells no moment."""

import csv
import hashlib
import io
import re
from pathlib import Path

OF_THE_MOMENT = ("*.report.json", "journal.jsonl", "index.duckdb")
"""Files that hold times, or what a life did and another found done: they must be there, and no more."""
ASIDE = re.compile(r"\.lightopd\.bad/\d+/")
"""Where a repair moves what is bad: one that was hurt, and the next, have a numbered folder each."""
CLOCK_COLUMNS = ("seconds", "tokens_per_second")
"""Columns of a metrics.csv that tell how long a step took; every other number is compared as written."""


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and size of each file below a folder, of what is no matter of the moment.

    An index that a repair moved aside is left out: a hurt one leaves it stale, the next one makes it anew.
    """
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    named = {ASIDE.sub(".lightopd.bad/", str(path.relative_to(folder))): path for path in files}
    return {name: _digest(path) for name, path in named.items() if not name.endswith(".bad/index.duckdb")}


def _digest(path: Path) -> tuple[str, int]:
    if path.is_symlink():
        return f"to {path.readlink()}", 0
    if any(map(path.match, OF_THE_MOMENT)):
        return "of the moment", 0
    data = path.read_bytes()
    if path.name == "metrics.csv":
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        data = repr([{k: v for k, v in row.items() if k not in CLOCK_COLUMNS} for row in rows]).encode()
    return hashlib.sha256(data).hexdigest(), len(data)


def differences(found: dict[str, tuple[str, int]], wanted: dict[str, tuple[str, int]]) -> list[str]:
    """In words, file by file."""
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} was left behind" for name in sorted(found.keys() - wanted.keys())),
        *(f"{name} differs" for name in sorted(found.keys() & wanted.keys()) if found[name] != wanted[name]),
    ]
