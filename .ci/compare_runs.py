"""Compare two runs of `lightopd run` or a demo, folder by folder: .ci/compare_runs.py BEFORE AFTER

Prints one line for each file that both have to agree on (cached shards, metrics but for seconds, weights),
and ends with 1 where one differs. For refactors, which must leave every value as it was, to the last bit.
"""

import csv
import hashlib
import sys
from pathlib import Path

CLOCK = ("seconds", "tokens_per_s", "memory")
"""Parts of the names of columns that tell of the machine."""


def content(path: Path) -> str:
    """A digest of what must be equal in a file."""
    if path.name != "metrics.csv":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    rows = list(csv.DictReader(path.open(newline="")))
    kept = [{k: v for k, v in row.items() if not any(part in k for part in CLOCK)} for row in rows]
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def files_of(run: Path) -> dict[str, Path]:
    """Shards, metrics and weights of a run, by their path below it."""
    found = [path for name in ("*.parquet", "metrics.csv", "*.safetensors") for path in run.rglob(name)]
    return {str(path.relative_to(run)): path for path in found}


def main() -> int:
    """Exit code 0 where both runs hold the same."""
    before, after = (files_of(Path(name)) for name in sys.argv[1:3])
    differing = 0
    for name in sorted(before.keys() | after.keys()):
        both = name in before and name in after
        same = both and content(before[name]) == content(after[name])
        differing += not same
        print(f"{'same' if same else 'DIFFERS' if both else 'only in one'}  {name}")
    return int(differing > 0 or not before)


if __name__ == "__main__":
    sys.exit(main())
