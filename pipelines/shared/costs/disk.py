"""How fast a folder's disk takes what is written to it, measured by writing a little."""

import os
import tempfile
import time
from pathlib import Path

CHUNK_BYTES = 4 << 20
LARGEST_BYTES = 64 << 20
LONGEST_S = 1.0


def write_rate(folder: Path) -> float | None:
    """Bytes a second of a short write that reached the disk, then removed; None where it cannot be made.

    Args:
        folder: where a cache lies or will lie; the nearest folder above that exists is written to.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    chunk, written = os.urandom(CHUNK_BYTES), 0
    try:
        with tempfile.TemporaryFile(dir=there, prefix=".lightopd-rate-") as file:
            began_s = time.monotonic()
            while written < LARGEST_BYTES and time.monotonic() - began_s < LONGEST_S:
                written += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            return written / (time.monotonic() - began_s)
    except OSError:
        return None
