"""Progress of a stage: a log line for people and the same numbers as a record."""

import json
import logging
import time
from pathlib import Path

from lightopd.telling import LIVE, duration

log = logging.getLogger(__name__)

EVERY_S = 5.0


class StageProgress:
    """Counts finished units and tells rate and time left; the journal is appended to `journal.jsonl`."""

    def __init__(self, stage: str, journal: Path, unit: str, total: int, done: int = 0) -> None:
        self.stage, self.journal, self.unit, self.total, self.done = stage, journal, unit, total, done
        self.started_with = done
        self.tokens = 0
        self.started_s = self.told_s = time.monotonic()
        if done:
            log.info("%s: %d of %d %s are done already", stage, done, total, unit)

    def advance(self, count: int = 1, tokens: int = 0) -> None:
        """Add finished units, with the response tokens in them; tell when it is time, and at the end."""
        self.done += count
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
        record = {
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "per_s": rate,
            "tokens_per_s": tokens_per_s,
            "left_s": left_s,
            "seconds": seconds,
        }
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
