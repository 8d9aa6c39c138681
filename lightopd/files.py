"""Every way to write a file that must survive a crash.

A file is written under a dot name in its own folder, flushed to the disk and renamed; then the folder's list
of names is flushed too. A finished folder gets its name in the same way, after every file in it was flushed.
Whoever looks sees the old one or the new one, whole.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightopd.errors import OutputError
from lightopd.processes import start_of, this_machine

Content = Any
"""Anything with a buffer: `bytes`, or Arrow's."""


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


def write_atomically(path: Path, content: Content, *, shared: bool = False) -> None:
    """Put a file in place whole or not at all; its folder is made where it is missing.

    Args:
        path: of the file.
        content: its bytes.
        shared: other processes may write the same file at the same moment; the last one stays.

    Raises:
        OutputError: the file could not be written; the message has the numbers and the remedy.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            remove_left_in(path.parent, path.name)
        with replaced_file(path, own_suffix() if shared else "") as part, part.open("wb") as file:
            file.write(content)
    except OSError as error:
        raise output_error(error, path, len(content)) from error


def remove_left_in(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are surely gone left of writing shared files.

    Args:
        folder: where.
        name: of a file that lies right in it; None: all files, in folders below too.
    """
    machine = this_machine()
    if not machine:
        return
    by = f".{socket.gethostname()}.{machine}."
    find, named = (folder.rglob, "*") if name is None else (folder.glob, glob.escape(name))
    for left in find(f".{named}{glob.escape(by)}*.tmp*"):
        pid = left.name.rpartition(by)[2].partition(".")[0]
        if pid.isdecimal() and start_of(int(pid)) is None:
            left.unlink(missing_ok=True)


def own_suffix() -> str:
    """End of a temporary file's name that no other process has, in a container or elsewhere."""
    return f".{socket.gethostname()}.{this_machine() or uuid.uuid4().hex}.{os.getpid()}"


def put_if_absent(path: Path, content: Content, *, is_durable: bool = True) -> bool:
    """Put a file in place whole, unless one of its name is there; whether this call did it.

    The finished file gets its name by a hard link, the one step that fails where a name is taken on network
    file systems as well.

    Args:
        path: of the file, in a folder that is there.
        content: its bytes.
        is_durable: flush it, and its folder's list of names, to the disk.

    Raises:
        FileNotFoundError: the folder is not there, or someone removed what was being written.
        OutputError: the file could not be written, or the file system has no hard links.
    """
    part = path.with_name(f".{path.name}{own_suffix()}.{uuid.uuid4().hex}.tmp")
    try:
        with part.open("wb") as file:
            file.write(content)
        if is_durable:
            flush(part)
        if not _link(part, path):
            return False
        if is_durable:
            flush(path.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise output_error(error, path, len(content)) from error
    finally:
        part.unlink(missing_ok=True)
    return True


def _link(part: Path, path: Path) -> bool:
    try:
        os.link(part, path)
    except OSError as error:
        # A network file system that lost the reply tries again, and finds the name that its first try made.
        if part.exists() and part.stat().st_nlink == 2:
            return True
        if error.errno == errno.EEXIST:
            return False
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise OutputError(
                f"{path.parent} lies on a file system without hard links, which several processes need to "
                "share a cache; give --exclusive"
            ) from error
        raise
    return True


@contextmanager
def replaced_file(path: Path, suffix: str = "") -> Iterator[Path]:
    """A path beside `path` to write to; when the body ends well, what lies there takes the place of `path`.

    Raises:
        OSError: the file could not be written; `path` is untouched.
    """
    part = path.with_name(f".{path.name}{suffix}.tmp")
    try:
        yield part
        flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    flush(path.parent)


def put_folder(part: Path, final: Path) -> None:
    """Give a finished folder its name, once everything in it lies on the disk; `final` is replaced.

    Raises:
        OSError: the disk fails; `final` is whole, or stands beside itself as `.<name>.old`.
    """
    for inner in [*part.rglob("*"), part]:
        flush(inner)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    part.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def looks_like_url(path: Path) -> str | None:
    """The URL that a path was made from, where a command that takes a folder got one; None for paths."""
    scheme, separator, rest = str(path).partition(":/")
    is_url = bool(separator) and len(scheme) > 1 and scheme.isalnum()
    if not is_url or path.exists():
        return None
    return f"{scheme}://{'/' if scheme == 'file' else ''}{rest.lstrip('/')}"


STREAMS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def stream_kind(path: Path) -> str | None:
    """What a path leads to, in words, where reading it as a file may never end; None for all else."""
    try:
        return STREAMS.get(stat.S_IFMT(path.stat().st_mode))
    except (OSError, ValueError):
        return None


def streams_in(*folders: Path) -> list[str]:
    """FIFOs, sockets and devices right inside some folders, links followed, each in words."""
    return [
        f"{entry.path} is {kind}, not a file; remove it"
        for folder in folders
        if folder.is_dir()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
        if not entry.is_file() and not entry.is_dir() and (kind := stream_kind(Path(entry.path)))
    ]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON for people and programs: sorted keys, two spaces, one line end."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def output_error(error: Exception, path: Path, size_bytes: int | None = None) -> OutputError:
    """A failure to write `path`, told with the numbers that are known and what to do."""
    number, reason = _cause(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        remedy = f"free space there ({_free_bytes(path)} bytes are free), then run the same command again"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "make the folder writable, or name another one"
    elif number in (errno.ENOTDIR, errno.EEXIST):
        remedy = "a file lies where a folder is needed; move it, or name another folder"
    else:
        remedy = "mend the cause, then run the same command again"
    size = "" if size_bytes is None else f" ({size_bytes} bytes)"
    return OutputError(f"cannot write {path}{size}: {reason}; {remedy}")


def _cause(error: Exception) -> tuple[int | None, str]:
    """The system's number of a failure, and its words; libraries written in Rust give them as text."""
    if isinstance(error, OSError) and error.strerror:
        return error.errno, error.strerror
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told is not None:
        return int(told[1]), os.strerror(int(told[1]))
    return None, (str(error) or type(error).__name__).splitlines()[0]


def _free_bytes(path: Path) -> int:
    existing = next((folder for folder in path.parents if folder.is_dir()), Path("/"))
    return shutil.disk_usage(existing).free
