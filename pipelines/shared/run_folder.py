"""An output folder: one writer at a time, and the resolved config beside the output."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lightopd.cache.buckets.stores.object_reader import sent_with
from lightopd.config import as_yaml
from lightopd.errors import OutputError
from lightopd.files import looks_like_url, output_error, write_atomically
from lightopd.ranks import is_main
from lightopd.schemas.base import StrictModel

LOCK = ".lightopd.lock"


def leave_unless(is_main: bool) -> None:
    """End a helper process of a run on several devices; its work is done when the training is."""
    if not is_main:
        raise SystemExit(0)


@contextlib.contextmanager
def writing(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the folder for the run's main process; the lock goes with the process, however it ends.

    Args:
        folder: made where it is missing.
        shared: with others that share too, and divide the work by claims. These do not need the lock, which
            keeps stages away that share with nobody; where the file system has none they do without.

    Raises:
        OutputError: it cannot be made or written, the disk is full, or another process is writing in it.
    """
    if not is_main():
        yield
        return
    if url := looks_like_url(folder):
        raise OutputError(
            f"{url} is a URL, and this command writes to a folder: name one, then {sent_with(url)} it there"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise output_error(error, folder) from error
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        is_taken = error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
        if is_taken or not shared:
            os.close(handle)
            raise _not_held(folder, is_taken, error) from error
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise output_error(error, folder) from error
        raise
    finally:
        os.close(handle)


def _not_held(folder: Path, is_taken: bool, error: OSError) -> OutputError:
    if is_taken:
        return OutputError(f"{folder}: another lightopd process is writing here; wait for it or stop it")
    return OutputError(
        f"{folder}: its file system has no locks ({error.strerror}), and another process could "
        "write here at the same time; name a folder on another one"
    )


def save_config(config: StrictModel, stage: str, folder: Path, *, only_first: bool = False) -> None:
    """Write the resolved config as `<stage>.yaml`; `lightopd <stage> -c` reads it back.

    With `only_first` one that is there stays: the run may yet be refused, and the folder is another run's.
    """
    if is_main() and not (only_first and (folder / f"{stage}.yaml").exists()):
        write_atomically(folder / f"{stage}.yaml", as_yaml(config).encode(), shared=True)
