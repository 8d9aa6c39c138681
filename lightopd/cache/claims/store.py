"""Where claims lie: keys with small contents, changed only by whoever knows what is there.

`ClaimStore` is all that claims need of a place; a folder is one, on a local disk or shared by machines.
"""

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

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


class FolderStore:
    """Claims in a folder: a folder for each key, and in it a file for each version; the highest number holds.

    A version comes to be by a hard link from a finished file onto a name that must be free, the one step that
    network file systems do for exactly one of several clients. The highest version is never removed, so
    that whoever was slow and makes a version that was there before finds a higher one, and has lost. An empty
    version says that the key has no content. Nothing is flushed: after a power failure no holder lives.
    """

    def __init__(self, root: Path, part: str = "") -> None:
        self.root, self.folder = root, root / part

    def all_keys(self) -> Sequence[str]:
        """Keys that may have a content, sorted."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []

    def read(self, key: str) -> bytes | None:
        """The content of a key; None where it has none."""
        return self._latest(key)[1] or None

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Give a key without content one; whether this call did it."""
        version, found = self._latest(key)
        if found:
            return False
        (self.folder / key).mkdir(parents=True, exist_ok=True)
        return self._put(key, version + 1, content)

    def replace_if_unchanged(self, key: str, old: bytes, new: bytes) -> bool:
        """Give a key another content if it has the old one; whether this call did it."""
        version, found = self._latest(key)
        return found == old and self._put(key, version + 1, new)

    def delete_if_unchanged(self, key: str, old: bytes) -> bool:
        """Take a key's content away if it is the old one; whether this call did it."""
        return self.replace_if_unchanged(key, old, b"")

    def clear(self) -> None:
        """Take all keys away, and the folders from the root on that are empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self.folder.parents:
            if not folder.is_relative_to(self.root):
                return
            with contextlib.suppress(OSError):  # another part's claims are in it
                folder.rmdir()

    def _put(self, key: str, version: int, content: bytes) -> bool:
        path = self._path(key, version)
        try:
            if not put_if_absent(path, content, is_durable=False):
                return False
        except FileNotFoundError:  # the claims were cleared meanwhile: everything is finished
            return False
        versions = self._versions(key)
        if versions and versions[-1] > version:
            path.unlink(missing_ok=True)
            return False
        for older in versions[:-1]:
            self._path(key, older).unlink(missing_ok=True)
        return True

    def _latest(self, key: str) -> tuple[int, bytes]:
        """The highest version and its content; version 0 is none."""
        while versions := self._versions(key):
            try:
                return versions[-1], self._path(key, versions[-1]).read_bytes()
            except FileNotFoundError:  # a higher one has come, and this one was removed
                continue
        return 0, b""

    def _versions(self, key: str) -> list[int]:
        try:
            names = [path.name for path in (self.folder / key).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def _path(self, key: str, version: int) -> Path:
        return self.folder / key / f"{version:08d}"
