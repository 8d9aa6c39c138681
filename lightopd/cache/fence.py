"""The one file system that SQL over a cache can reach: files below the cache folder, for reading."""

import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec


class ThreadedFile:
    """A file for reading in which every thread has a position of its own.

    DuckDB shares one handle among its threads and reads by a seek and then a read; with one common position,
    a thread's seek would move another one's read.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._descriptor).st_size
        self._own = threading.local()

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
        while wanted > 0 and (part := os.pread(self._descriptor, wanted, position)):
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        self._own.position = position
        return b"".join(parts)

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class ReadOnlyFolder(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """`cache://`: files below one folder, for reading; links that lead out of it are refused."""

    protocol = "cache"
    cachable = False

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root: Path = root.resolve()

    def _inside(self, path: str) -> Path:
        inner: str = self._strip_protocol(path)
        found: Path = (self.root / inner.lstrip("/")).resolve()
        if not found.is_relative_to(self.root):
            raise PermissionError(f"{path} lies outside the cache folder")
        return found

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        return {"name": str(path.relative_to(self.root)), "size": path.stat().st_size, "type": kind}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = self._inside(path)
        entries = [self._entry(item) for item in (sorted(found.iterdir()) if found.is_dir() else [found])]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self._entry(self._inside(path))

    def exists(self, path: str, **_: Any) -> bool:
        return self._inside(path).exists()

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(self._inside(path).stat().st_mtime, UTC)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode != "rb":
            raise PermissionError("a cache is opened for reading only")
        return ThreadedFile(self._inside(path))
