"""Fails when an installed package is not the version that a constraints file names.

python .ci/check_versions.py constraints.txt
"""

import importlib.metadata
import sys
from pathlib import Path


def main() -> None:
    """Compare every pinned package that is installed; a local part such as +cpu does not count."""
    wrong = []
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        name, separator, wanted = line.partition("==")
        if line.startswith("#") or not separator:
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.partition("+")[0] != wanted:
            wrong.append(f"{name} is {found}, {sys.argv[1]} says {wanted}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
