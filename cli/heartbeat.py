"""No long silence on a terminal: a line about what is under way whenever nothing else was said."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from lightopd.ranks import is_main
from lightopd.telling import LIVE, duration

SILENCE_S = 5.0

log = logging.getLogger(__name__)


class _Heard(logging.Handler):
    """Remembers when the last line was said."""

    def __init__(self) -> None:
        super().__init__()
        self.last_s = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the time."""
        self.last_s = time.monotonic()


@contextlib.contextmanager
def never_silent(command: str, silence_s: float = SILENCE_S) -> Iterator[None]:
    """Within, on a terminal, `command: what is under way, h:mm:ss` after every `silence_s` without a line."""
    if not sys.stderr.isatty() or not is_main():
        yield
        return
    heard, ended, started_s = _Heard(), threading.Event(), time.monotonic()

    def watch() -> None:
        from lightopd.under_way import now_doing

        while not ended.wait(silence_s / 5):
            if time.monotonic() - heard.last_s >= silence_s:
                since = duration(time.monotonic() - started_s)
                log.info("%s, %s", now_doing() or f"{command}: working", since, extra=LIVE)

    logger = logging.getLogger("lightopd")
    logger.addHandler(heard)
    thread = threading.Thread(target=watch, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        logger.removeHandler(heard)
