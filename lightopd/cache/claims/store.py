"""Where claims lie: keys with small contents, changed only by whoever knows what is there.

`ClaimStore` is all that claims need of a place: a folder, on a local disk or shared by machines, or a URL.
"""

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.files import put_if_absent


class ClaimStore(Protocol):
    """Keys and contents. Contents are never empty, and no two that are ever put under one key are equal."""

    def all_keys(self) -> Sequence[str]:
        """Keys that may have a content, sorted."""

    def read(self, key: str) -> bytes | None:
        """The content of a key; None where it has none."""

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Give a key without content one; whether this call did it."""

    def replace_if_unchanged(self, key: str, old: bytes, new: bytes) -> bool:
        """Give a key another content if it has the old one; whether this call did it."""

    def delete_if_unchanged(self, key: str, old: bytes) -> bool:
        """Take a key's content away if it is the old one; whether this call did it."""

    def clear(self) -> None:
        """Take all keys away: nobody needs them any more."""


class VersionedStore(ABC):
    """Claims as a place for each key, and in it a content for each version; the highest number holds.

    A version comes to be under a name that must be free, the one step that network file systems and object
    stores do for exactly one of several clients. The highest version is never removed, so that whoever was
    slow and makes a version that was there before finds a higher one, and has lost. An empty version says
    that the key has no content.
    """

    def read(self, key: str) -> bytes | None:
        """The content of a key; None where it has none."""
        return self._latest(key)[1] or None

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Give a key without content one; whether this call did it."""
        version, found = self._latest(key)
        if found:
            return False
        return self._put(key, version + 1, content)

    def replace_if_unchanged(self, key: str, old: bytes, new: bytes) -> bool:
        """Give a key another content if it has the old one; whether this call did it."""
        version, found = self._latest(key)
        return found == old and self._put(key, version + 1, new)

    def delete_if_unchanged(self, key: str, old: bytes) -> bool:
        """Take a key's content away if it is the old one; whether this call did it."""
        return self.replace_if_unchanged(key, old, b"")

    def _put(self, key: str, version: int, content: bytes) -> bool:
        if not self._create(key, version, content):
            return False
        versions = self._versions(key)
        if versions and versions[-1] > version:
            self._remove(key, version)
            return False
        for older in versions[:-1]:
            self._remove(key, older)
        return True

    def _latest(self, key: str) -> tuple[int, bytes]:
        """The highest version and its content; version 0 is none."""
        while versions := self._versions(key):
            content = self._content(key, versions[-1])
            if content is not None:  # else a higher one has come, and this one was removed
                return versions[-1], content
        return 0, b""

    @abstractmethod
    def _versions(self, key: str) -> list[int]:
        """Versions of a key, sorted."""

    @abstractmethod
    def _content(self, key: str, version: int) -> bytes | None:
        """Content of a version; None where there is none."""

    @abstractmethod
    def _create(self, key: str, version: int, content: bytes) -> bool:
        """Make a version that must not be there; whether this call did it."""

    @abstractmethod
    def _remove(self, key: str, version: int) -> None:
        """Take a version away; nothing where there is none."""


class FolderStore(VersionedStore):
    """Claims in a folder: a folder for each key, and in it a file for each version.

    A version comes to be by a hard link from a finished file. Nothing is flushed: after a power failure no
    holder lives.
    """

    def __init__(self, root: Path, part: str = "") -> None:
        self.root, self.folder = root, root / part

    def all_keys(self) -> Sequence[str]:
        """Keys that may have a content, sorted."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []

    def clear(self) -> None:
        """Take all keys away, and the folders from the root on that are empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self.folder.parents:
            if not folder.is_relative_to(self.root):
                return
            with contextlib.suppress(OSError):  # another part's claims are in it
                folder.rmdir()

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Give a key without content one; whether this call did it."""
        (self.folder / key).mkdir(parents=True, exist_ok=True)
        return super().put_if_absent(key, content)

    def _versions(self, key: str) -> list[int]:
        try:
            names = [path.name for path in (self.folder / key).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def _content(self, key: str, version: int) -> bytes | None:
        try:
            return self._path(key, version).read_bytes()
        except FileNotFoundError:
            return None

    def _create(self, key: str, version: int, content: bytes) -> bool:
        try:
            return put_if_absent(self._path(key, version), content, is_durable=False)
        except FileNotFoundError:  # the claims were cleared meanwhile: everything is finished
            return False

    def _remove(self, key: str, version: int) -> None:
        self._path(key, version).unlink(missing_ok=True)

    def _path(self, key: str, version: int) -> Path:
        return self.folder / key / f"{version:08d}"


class BucketStore(VersionedStore):
    """Claims in an object store: an object for each version, put only where none is.

    Those of a folder above have the others' keys with the names of the folders before them.
    """

    def __init__(self, bucket: Bucket, folder: str) -> None:
        self.bucket, self.folder = bucket, folder

    def all_keys(self) -> Sequence[str]:
        """Keys that may have a content, sorted."""
        names = self.bucket.names_below(self.folder)
        return sorted({name.removeprefix(f"{self.folder}/").rpartition("/")[0] for name in names})

    def clear(self) -> None:
        """Take all keys away."""
        for name in self.bucket.names_below(self.folder):
            self.bucket.delete(name)
        self.bucket.clear_left(self.folder)

    def _versions(self, key: str) -> list[int]:
        names = self.bucket.names_below(f"{self.folder}/{key}")
        return sorted(int(name.rpartition("/")[2]) for name in names)

    def _content(self, key: str, version: int) -> bytes | None:
        return self.bucket.read(self._name(key, version))

    def _create(self, key: str, version: int, content: bytes) -> bool:
        return self.bucket.put_if_absent(self._name(key, version), content)

    def _remove(self, key: str, version: int) -> None:
        self.bucket.delete(self._name(key, version))

    def _name(self, key: str, version: int) -> str:
        return f"{self.folder}/{key}/{version:08d}"
