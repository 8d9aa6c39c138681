"""One replica: a process of a stage with an engine of its own, and what became of it.

Whoever starts one, a command on this machine or an actor of Ray, holds a pipe to it open; the replica stops
when the pipe closes. What they all made is told once.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightopd import errors
from lightopd.cache.buckets.places import place_of
from lightopd.errors import EngineError, LightopdError
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.reports import Report, report_of
from lightopd.stopping import TERMINATED, Terminated
from lightopd.under_way import doing

REPLICA = "LIGHTOPD_REPLICA"
"""Set in a replica: the pipe that closes when the process that started it ends."""
POLL_S = 0.2
LOOK_S = 5.0
"""Seconds between two looks at what is at a cache's URL."""
GRACE_S = 20.0
"""Seconds that a replica has to let go of its claim and its engine when it is stopped."""
_COMMAND = "from lightopd.cli.main import main; main()"
_ERRORS = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LightopdError)
}


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica at work."""

    number: int
    process: "subprocess.Popen[bytes]"
    out: Path
    """What it prints: its report."""
    said: Path
    """What it says on stderr."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a replica."""

    number: int
    code: int
    """Its exit code; below zero, the signal that killed it."""
    told: str = ""
    """Why it failed, in words; empty where it did not."""
    report: str = ""
    """Its report as JSON; empty where it failed."""


def start_replica(stage: str, config: Path, number: int, environment: dict[str, str], alive: int) -> Replica:
    """Start a replica.

    Args:
        stage: its command.
        config: file of its config; what it prints and says lies beside it.
        number: of the replica, from 1.
        environment: its whole environment.
        alive: end of a pipe to read from; the replica stops when the other end is closed.
    """
    out, said = (config.with_name(f"{number}.{kind}") for kind in ("out", "said"))
    with out.open("wb") as stdout, said.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, stage, "-c", str(config), "--json"],
            env={**environment, REPLICA: str(alive)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(alive,),
            start_new_session=True,  # Ctrl-C reaches the process that starts it, which passes it on once
        )
    return Replica(number, process, out, said)


def outcome_of(replica: Replica) -> Outcome | None:
    """What became of a replica; None while it works."""
    code = replica.process.poll()
    if code is None:
        return None
    if code == 0:
        return Outcome(replica.number, 0, report=replica.out.read_text(encoding="utf-8"))
    lines = replica.said.read_text(errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "stopped"))]
    if code < 0:
        return Outcome(
            replica.number, code, f"killed ({signal.Signals(-code).name}), often for want of memory"
        )
    return Outcome(replica.number, code, f"{(told or lines or ['it said nothing'])[-1]} (exit code {code})")


def end_with_starter() -> None:
    """In a replica: stop when the process that started it is gone, however it ended.

    In an orderly way, and after `GRACE_S` in any case, as the starter would see to: SIGALRM is not caught and
    ends the process wherever it is.
    """
    if REPLICA not in os.environ:
        return
    alive = int(os.environ.pop(REPLICA))

    def wait() -> None:
        os.read(alive, 1)
        signal.alarm(round(GRACE_S))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="starter").start()


class JointProgress:
    """Tells how far the replicas of a stage are together, by the shards that are there."""

    def __init__(self, stage: str, folder: Path, num_shards: int) -> None:
        self._stage, self._folder, self._total = stage, folder, num_shards
        self._place, self._looked_s = place_of(folder), time.monotonic()
        self._progress = StageProgress(stage, None, "shards", num_shards, self._there())

    def tell(self, *, is_last: bool = False) -> None:
        """Tell of the shards that have come since; a URL is looked at now and then, and at last."""
        if self._place is not None and (is_last or time.monotonic() - self._looked_s > LOOK_S):
            self._place.look()
            self._looked_s = time.monotonic()
        for _ in range(self._there() - self._progress.done):
            self._progress.advance(is_own=False)

    def at_work(self, num_replicas: int) -> contextlib.AbstractContextManager[None]:
        """Within, so many replicas are what is under way."""
        return doing(
            f"{self._stage}: {num_replicas} replicas at work, {self._progress.done} of {self._total} shards"
        )

    def _there(self) -> int:
        return sum(1 for _ in self._folder.glob("part-*.json"))


def joint_report(stage: str, outcomes: Sequence[Outcome], notes: Sequence[str] = ()) -> Report:
    """The report of a replica that ended well, all of which speak of the whole.

    Args:
        stage: that they ran.
        outcomes: of all of them.
        notes: what is to be told beside.

    Raises:
        LightopdError: none ended well; what the first one said, with its exit code.
        KeyboardInterrupt: none ended well, and the first was stopped.
    """
    well = [outcome for outcome in outcomes if not outcome.code]
    failed = sorted((outcome for outcome in outcomes if outcome.code), key=lambda each: each.number)
    if not well:
        first = failed[0]
        if first.code in (TERMINATED, 130):
            raise Terminated if first.code == TERMINATED else KeyboardInterrupt
        same = sum(outcome.told == first.told for outcome in failed)
        raise _ERRORS.get(first.code, EngineError)(
            f"all {len(outcomes)} replicas failed, {same} of them alike; replica {first.number}: {first.told}"
        )
    report = report_of(json.loads(well[-1].report))
    lost = [f"replica {each.number} failed: {each.told}; the others made its shards" for each in failed]
    figures = {name: value for name, value in report.figures.items() if name != "tokens_per_s"}
    return replace(
        report,
        stage=stage,
        figures={**figures, "replicas": len(outcomes)},
        notes=(*report.notes, *notes, *lost),
    )
