"""How far things are, as it is told: durations in words, and log lines that a terminal redraws in place."""

import contextlib
import datetime
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LIVE = {"is_live": True}
"""`extra` of a log line that only says how far things are: on a terminal the next one takes its place."""
_CLEARED = "\r\x1b[2K"


def duration(seconds: float) -> str:
    """A duration in seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


_called: dict[str, str] = {}
"""Folders, and what people read in their place."""


def call(folder: Path, name: str) -> None:
    """Have a folder told by another name from now on, such as a URL's mirror by the URL."""
    _called[str(folder)] = name


def called(text: str) -> str:
    """Text with the names of folders in their places."""
    for folder, name in _called.items():
        text = text.replace(folder, name)
    return text


def printable(text: str) -> str:
    """Text in one line, without control characters that a terminal would obey, of folders by their names."""
    return "".join(letter if letter.isprintable() else " " for letter in called(text))


class _Printable(logging.Formatter):
    """Time and message, without control characters that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record."""
        return "\n".join(map(printable, super().format(record).split("\n")))


class LogLines(logging.StreamHandler[TextIO]):
    """Writes a log to a stream; on a terminal, lines marked `LIVE` are drawn in one place.

    Live lines below INFO are for a terminal alone: a log file has the others of them, a few a minute.

    Args:
        stream: where to, stderr as a rule.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(_Printable("%(asctime)s %(message)s", "%H:%M:%S"))
        self.shows_debug = False
        self._is_drawn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Draw a live line over the last one, write any other below."""
        if getattr(record, "is_live", False) and self.stream.isatty():
            columns = shutil.get_terminal_size().columns
            self.stream.write(_CLEARED + printable(record.getMessage())[: columns - 1])
            self.flush()
            self._is_drawn = True
        elif record.levelno >= logging.INFO or self.shows_debug:
            self.clear()
            super().emit(record)

    def clear(self) -> None:
        """Take the live line away, before something else is written to the terminal."""
        if self._is_drawn:
            self.stream.write(_CLEARED)
            self.flush()
            self._is_drawn = False


@contextlib.contextmanager
def live_line_cleared() -> Iterator[None]:
    """At the end, however it comes, no live line of the log `lightopd` is left on the terminal."""
    try:
        yield
    finally:
        for handler in logging.getLogger("lightopd").handlers:
            if isinstance(handler, LogLines):
                handler.clear()
