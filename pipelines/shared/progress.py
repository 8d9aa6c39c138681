"""Progress of a stage: a log line for people and the same numbers as a record."""

import json
import logging
import os
import time
from pathlib import Path

from lightopd.telling import LIVE, duration

log = logging.getLogger(__name__)

EVERY_S = 5.0


class StageProgress:
    """Counts finished units and tells rate and time left; the journal, if any, is appended to.

    Its first line tells what was done already: a process may end before it tells more.
    """

    def __init__(self, stage: str, journal: Path | None, unit: str, total: int, done: int = 0) -> None:
        self.stage, self.journal, self.unit, self.total, self.done = stage, journal, unit, total, done
        self.started_with = done
        self.made = 0
        self.tokens = 0
        self.started_s = self.told_s = time.monotonic()
        if done:
            log.info("%s: %d of %d %s are done already", stage, done, total, unit)
        self._record(0.0, 0.0, 0.0, 0.0)

    def advance(self, tokens: int = 0, *, is_own: bool = True) -> None:
        """Add a finished unit, with the response tokens in it; tell when it is time, and at the end.

        Args:
            tokens: response tokens in it.
            is_own: this process made it, and no other one that shares the work.
        """
        self.done += 1
        self.made += is_own
        self.tokens += tokens
        now_s = time.monotonic()
        if now_s - self.told_s >= EVERY_S or self.done >= self.total:
            self.told_s = now_s
            self._tell(now_s - self.started_s)

    def _tell(self, seconds: float) -> None:
        rate = (self.done - self.started_with) / max(seconds, 1e-9)
        left_s = (self.total - self.done) / rate if rate else 0.0
        tokens_per_s = self.tokens / max(seconds, 1e-9)
        log.info(
            "%s: %d/%d %s, %.3g/s, %.0f tokens/s, %s left",
            *(self.stage, self.done, self.total, self.unit, rate, tokens_per_s, duration(left_s)),
            extra=LIVE if self.done < self.total else None,
        )
        self._record(rate, tokens_per_s, left_s, seconds)

    def _record(self, rate: float, tokens_per_s: float, left_s: float, seconds: float) -> None:
        if self.journal is None:
            return
        record = {
            "stage": self.stage,
            "pid": os.getpid(),
            "made": self.made,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "per_s": rate,
            "tokens_per_s": tokens_per_s,
            "left_s": left_s,
            "seconds": seconds,
        }
        with self.journal.open("ab", buffering=0) as file:  # a line in one write, beside other processes'
            file.write((json.dumps(record) + "\n").encode())
