"""An output folder: one writer at a time, and the resolved config beside the output."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lightopd.config import as_yaml
from lightopd.errors import OutputError
from lightopd.files import output_error, write_atomically
from lightopd.ranks import is_main
from lightopd.schemas.base import StrictModel

LOCK = ".lightopd.lock"


def leave_unless(is_main: bool) -> None:
    """End a helper process of a run on several devices; its work is done when the training is."""
    if not is_main:
        raise SystemExit(0)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder for the run's main process; the lock goes with the process, however it ends.

    Raises:
        OutputError: it cannot be made or written, the disk is full, or another process is writing in it.
    """
    if not is_main():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise output_error(error, folder) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise OutputError(
            f"{folder}: another lightopd process is writing here; wait for it or stop it"
        ) from error
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise output_error(error, folder) from error
        raise
    finally:
        os.close(handle)


def save_config(config: StrictModel, stage: str, folder: Path, *, only_first: bool = False) -> None:
    """Write the resolved config as `<stage>.yaml`; `lightopd <stage> -c` reads it back.

    With `only_first` one that is there stays: the run may yet be refused, and the folder is another run's.
    """
    if is_main() and not (only_first and (folder / f"{stage}.yaml").exists()):
        write_atomically(folder / f"{stage}.yaml", as_yaml(config).encode())
