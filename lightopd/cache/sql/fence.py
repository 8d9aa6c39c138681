"""The one file system that SQL over a cache can reach: files below the cache folder, for reading."""

import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec

from lightopd.cache.buckets.mirrors import MIRROR, Mirror, mirror_of, size_of, when_here
from lightopd.cache.buckets.ranges import BLOCK_BYTES, Ranges
from lightopd.cache.buckets.stores.object_reader import PIECE_BYTES
from lightopd.cache.shards import read_marker
from lightopd.errors import CacheError


class ThreadedFile:
    """A file for reading in which every thread has a position of its own.

    DuckDB shares one handle among its threads and reads by a seek and then a read; with one common position,
    a thread's seek would move another one's read.
    """

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._descriptor).st_size
        self._own = threading.local()

    def _part(self, size: int, position: int) -> bytes:
        return os.pread(self._descriptor, size, position)

    def tell(self) -> int:
        """Position of the calling thread, bytes from the beginning."""
        return int(getattr(self._own, "position", 0))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the calling thread's position; returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._own.position = base + offset
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        """So many bytes from the calling thread's position, fewer at the end of the file."""
        position = self.tell()
        wanted = self._size - position if size < 0 else size
        parts = []
        while wanted > 0 and (part := self._part(wanted, position)):
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        self._own.position = position
        return b"".join(parts)

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        """DuckDB drops a file that it is done with and does not close it."""
        self.close()


class AwayFile(ThreadedFile):
    """A shard that is not here yet: its end comes alone, its rows with all of it, or, if large, by ranges."""

    def __init__(self, path: Path, mirror: Mirror, ranges: Ranges, whole_bytes: int) -> None:
        self._path, self._name, self._ranges = path, mirror.name_of(path), ranges
        self._size, self._own, self._descriptor = mirror.sizes[self._name], threading.local(), -1
        self._is_small, self._lock = self._size <= whole_bytes, threading.Lock()

    def _part(self, size: int, position: int) -> bytes:
        if position >= self._size:
            return b""
        if not self._is_small or position >= self._size - BLOCK_BYTES:
            return self._ranges.read(self._name, position, min(size, self._size - position))
        with self._lock:
            if self._descriptor < 0:
                self._descriptor = _fetched(self._path)
        return os.pread(self._descriptor, size, position)


def _fetched(path: Path) -> int:
    """Descriptor of a shard that was fetched and compared with its marker."""
    marker = read_marker(path.parent, int(path.stem.removeprefix("part-")))
    if marker is None:
        raise CacheError(f"{path} has no valid marker")
    return when_here(path, marker.sha256, lambda: os.open(path, os.O_RDONLY))


class ReadOnlyFolder(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """`cache://`: files below one folder, for reading; links that lead out of it are refused.

    Args:
        root: the folder, or the mirror of a URL, whose shards are there as well.
        whole_bytes: size up to which a shard at a URL comes whole.
    """

    protocol = "cache"
    cachable = False

    def __init__(self, root: Path, whole_bytes: int = PIECE_BYTES) -> None:
        super().__init__()
        self.root: Path = root.resolve()
        self._whole_bytes = whole_bytes
        self._mirror = mirror_of(self.root)
        self.ranges = None if self._mirror is None else Ranges(self._mirror)

    def _inside(self, path: str) -> Path:
        inner: str = self._strip_protocol(path)
        found: Path = (self.root / inner.lstrip("/")).resolve()
        if not found.is_relative_to(self.root):
            raise PermissionError(f"{path} lies outside the cache folder")
        return found

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        size_bytes = path.stat().st_size if kind == "directory" else size_of(path)
        if size_bytes is None:
            raise FileNotFoundError(path)
        return {"name": str(path.relative_to(self.root)), "size": size_bytes, "type": kind}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = self._inside(path)
        entries = [self._entry(item) for item in (sorted(found.iterdir()) if found.is_dir() else [found])]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self._entry(self._inside(path))

    def exists(self, path: str, **_: Any) -> bool:
        found = self._inside(path)
        return found.is_dir() or size_of(found) is not None

    def modified(self, path: str) -> datetime:
        found = self._inside(path)
        known = found if self._mirror is None else self._mirror.folder / MIRROR
        return datetime.fromtimestamp(known.stat().st_mtime, UTC)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            raise PermissionError("a cache is opened for reading only")
        found = self._inside(path)
        try:
            return ThreadedFile(found)
        except FileNotFoundError:
            if self._mirror is None or self.ranges is None or size_of(found) is None:
                raise
            return AwayFile(found, self._mirror, self.ranges, self._whole_bytes)
