"""What a URL is read through, whatever answers there: objects whole or in pieces, tried again, checked."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lightopd.errors import CacheError
from lightopd.files import output_error, own_suffix, replaced_file, write_atomically
from lightopd.schemas.stores.buckets import BucketConfig

PIECE_BYTES = 16 * 1024 * 1024
"""Most bytes of one request."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0

Answer = TypeVar("Answer")


class ObjectReader(ABC):
    """The objects below a URL, by their names relative to it.

    Args:
        url: of the folder.
        config: how hard it is tried.
    """

    def __init__(self, url: str, config: BucketConfig | None) -> None:
        self.url, self.config = url.rstrip("/"), config or BucketConfig()

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every object, by name."""
        return {name: size_bytes for name, (size_bytes, _) in self.listed().items()}

    @abstractmethod
    def listed(self) -> dict[str, tuple[int, str]]:
        """Size in bytes of every object, and what changes with its content, by name."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a small object; None where there is none."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """So many bytes of an object, all of which are there.

        Raises:
            InputError: the object cannot be read.
        """

    def download(
        self, name: str, size_bytes: int, path: Path, check: Callable[[Path], None], suffix: str = ""
    ) -> None:
        """An object as a file that is whole or not there.

        Args:
            name: of the object.
            size_bytes: of the object.
            path: of the file.
            check: refuses what came, before the file gets its name.
            suffix: of the file's name while it comes, where several may fetch it at the same moment.

        Raises:
            InputError: the object cannot be read.
            OutputError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path, suffix) as part:
                with part.open("wb") as file:
                    for start in range(0, size_bytes, PIECE_BYTES):
                        file.write(self.read_range(name, start, min(PIECE_BYTES, size_bytes - start)))
                check(part)
        except OSError as error:
            raise output_error(error, path, size_bytes) from error

    def fetch(self, name: str, size_bytes: int, path: Path, *, shared: bool = False) -> None:
        """An object that nothing is known of but its size as a file: in one request, or in pieces.

        Args:
            name: of the object.
            size_bytes: of the object, as it was listed.
            path: of the file.
            shared: others may write the same file at the same moment; the last one stays.

        Raises:
            CacheError: it is gone.
            InputError: the object cannot be read.
            OutputError: the file cannot be written.
        """
        if size_bytes > PIECE_BYTES:
            suffix = f"{own_suffix()}.{threading.get_ident()}" if shared else ""
            self.download(name, size_bytes, path, lambda part: None, suffix)
            return
        content = self.read(name)
        if content is None:
            raise CacheError(f"{self._at(name)} was listed and is gone; run the same command again")
        write_atomically(path, content, shared=shared)

    @abstractmethod
    def _is_passing(self, error: Exception) -> bool:
        """Whether a failure may pass by itself, so that the same request is made again."""

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _again(self, ask: Callable[[], Answer]) -> Answer:
        """The answer to a request that is made again, with growing pauses, while its failure may pass."""
        until_s, pause_s = time.monotonic() + self.config.retry_s, FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except Exception as error:
                if not self._is_passing(error) or time.monotonic() + pause_s > until_s:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def sent_with(url: str) -> str:
    """The command that brings a cache to a URL, in words."""
    return "`hf upload`" if url.startswith("hf:") else "`lightopd push`"
