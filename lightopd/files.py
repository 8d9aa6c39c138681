"""Files that must survive a crash."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk.

    Raises:
        OSError: it does not exist, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
