"""The local side of a cache that is read where it lies, at a URL: a folder with all of it but the shards.

    <user cache>/lightopd/buckets/<URL>/cache/   lightopd.json   rollouts/part-NNNNN.json   signals/...
                                                 .lightopd.mirror: the URL, and what lies there

A shard comes when it is read, and goes when another one needs its room. Its time of last change is made from
its SHA-256, so that a file says whether it is the one its marker speaks of; its time of last access says how
long ago it was of use. In a folder that is no mirror everything here does nothing.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from lightopd.cache.buckets.shard_cache import make_room
from lightopd.cache.buckets.stores.bucket import is_usable
from lightopd.cache.buckets.stores.object_reader import sent_with
from lightopd.cache.buckets.stores.opened import opened
from lightopd.errors import CacheError, InputError, LightopdError
from lightopd.files import file_sha256, own_suffix, write_atomically

MIRROR = ".lightopd.mirror"
"""File in a mirror: the URL, and the sizes of its objects by name."""
FOLDER = "cache"
"""Of a mirror, below a folder of its own: what stages look for beside a cache is not another mirror's."""
TRIES = 4

Value = TypeVar("Value")

Stamp = tuple[int, int]
"""Of a file: size in bytes and time of last change in nanoseconds."""

_bringing: dict[Path, threading.Lock] = {}
_guard = threading.Lock()


@dataclass(frozen=True, slots=True)
class Mirror:
    """A folder that stands for a URL."""

    folder: Path
    url: str
    sizes: Mapping[str, int]
    """Bytes of the objects at the URL, by name, as they were listed."""

    def name_of(self, path: Path) -> str:
        """Name of the object that a file of the mirror is, or would be."""
        return path.relative_to(self.folder).as_posix()


def mirrors_folder() -> Path:
    """Folder of all mirrors."""
    root = os.environ.get("XDG_CACHE_HOME")
    return ((Path(root) if root else Path.home() / ".cache") / "lightopd" / "buckets").resolve()


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a path lies in; None where it lies in none."""
    root = mirrors_folder()
    if not path.is_relative_to(root) or path == root:
        return None
    folder = root / path.relative_to(root).parts[0] / FOLDER
    try:
        return _described(folder, (folder / MIRROR).stat().st_mtime_ns)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=64)
def _described(folder: Path, _: int) -> Mirror:
    plain = json.loads((folder / MIRROR).read_bytes())
    return Mirror(folder, plain["url"], {name: size for name, (size, _) in plain["objects"].items()})


def size_of(path: Path) -> int | None:
    """Bytes of a shard's file, here or at its URL; None where there is none."""
    mirror = mirror_of(path)
    if mirror is not None:
        return mirror.sizes.get(mirror.name_of(path))
    return path.stat().st_size if path.is_file() else None


def files_in(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder that a pattern fits, those that are not fetched among them."""
    there = mirror_of(folder)
    if there is None:
        return list(folder.glob(pattern))
    names = (there.folder / name for name in there.sizes)
    return [path for path in names if path.parent == folder and path.match(pattern)]


def is_here(path: Path, sha256: str) -> bool:
    """Whether a mirror's shard was fetched, and is still the one that is wanted."""
    try:
        return path.stat().st_mtime_ns == _time_of(sha256)
    except FileNotFoundError:
        return False


def stamp_of(path: Path, sha256: str) -> Stamp | None:
    """The stamp of a shard's file, or that of a mirror's once it is fetched; None where there is none."""
    mirror = mirror_of(path)
    if mirror is not None:
        size_bytes = mirror.sizes.get(mirror.name_of(path))
        return None if size_bytes is None else (size_bytes, _time_of(sha256))
    return stamp_here(path)


def stamp_here(path: Path) -> Stamp | None:
    """The stamp of a file on this machine; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def is_away(path: Path) -> bool:
    """Whether a file of a mirror is not here now."""
    return not path.exists() and mirror_of(path) is not None


def when_here(path: Path, sha256: str, read: Callable[[], Value]) -> Value:
    """What `read` makes of a file that is here; a mirror's is fetched first.

    Raises:
        InputError: the store cannot be read.
        CacheError: what came is not what is wanted.
        OutputError: it cannot be written.
        FileNotFoundError: there is no such file.
    """
    for _ in range(TRIES):  # another process may take the room between the two
        bring(path, sha256)
        try:
            return read()
        except FileNotFoundError:
            if mirror_of(path) is None:
                raise
    raise CacheError(
        f"{path} was fetched {TRIES} times and gone before it was read: another process needs its room; "
        "raise LIGHTOPD_SHARD_CACHE_BYTES"
    )


def bring(path: Path, sha256: str) -> None:
    """See that a mirror's file is here, and the one that is wanted.

    Raises:
        InputError: the store cannot be read.
        CacheError: what came is not what is wanted.
        OutputError: it cannot be written.
    """
    mirror = mirror_of(path)
    if mirror is None:
        return
    with _one_at_a_time(path):
        if is_here(path, sha256):
            _mark(path, sha256)
        elif not is_usable():
            _bring_by_another(path, sha256)
        else:
            _fetch(mirror, path, sha256)


def keep(path: Path, content: bytes) -> None:
    """Keep a copy of a shard of a mirror that was made on this machine."""
    make_room(mirrors_folder(), len(content))
    write_atomically(path, content, shared=True)
    _mark(path, hashlib.sha256(content).hexdigest())


def forget(path: Path) -> None:
    """Remove a mirror's copy of a shard that is not what it was; the next reader fetches it."""
    if mirror_of(path) is not None:
        path.unlink(missing_ok=True)


def _fetch(mirror: Mirror, path: Path, sha256: str) -> None:
    name = mirror.name_of(path)
    size_bytes = mirror.sizes.get(name)
    if size_bytes is None:
        raise CacheError(
            f"{mirror.url}/{name} is missing; send the cache there again with {sent_with(mirror.url)}"
        )

    def check(part: Path) -> None:
        found = file_sha256(part)
        if found != sha256:
            raise CacheError(
                f"{mirror.url}/{name} has SHA-256 {found[:12]}, its marker says {sha256[:12]}; delete the "
                f"object and send the cache there again with {sent_with(mirror.url)}"
            )
        _mark(part, sha256)

    make_room(mirrors_folder(), size_bytes)
    opened(mirror.url).download(name, size_bytes, path, check, f"{own_suffix()}.{threading.get_ident()}")


def _bring_by_another(path: Path, sha256: str) -> None:
    """A fork has none of the threads that its parent's requests go through, and would wait for ever."""
    command = [sys.executable, "-P", "-m", "lightopd.cache.buckets.mirrors", str(path), sha256]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.strip().splitlines()[-1])


def _mark(path: Path, sha256: str) -> None:
    """Say of a file that it is used now, and whose SHA-256 it has."""
    os.utime(path, ns=(time.time_ns(), _time_of(sha256)))


def _time_of(sha256: str) -> int:
    """A time before 2005 in whole seconds, which every file system keeps as it is."""
    return (int(sha256[:8], 16) >> 2) * 10**9


def _one_at_a_time(path: Path) -> threading.Lock:
    with _guard:
        return _bringing.setdefault(path, threading.Lock())


if __name__ == "__main__":
    try:
        bring(Path(sys.argv[1]), sys.argv[2])
    except LightopdError as error:
        sys.exit(str(error))
