"""What runs on a node of a Ray cluster: a process that starts one replica there and watches it."""

import os
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lightopd import __version__
from lightopd.errors import ConfigError
from lightopd.pipelines.workers.replica import GRACE_S, Outcome, Replica, outcome_of, start_replica

WATCH_S = 1.0
"""Longest wait for a replica to end in one call."""
KILLED_AGAIN = 3
"""Times that a replica is started again after it was killed, on the same node."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every actor is to do."""

    stage: str
    config: str
    """YAML of the stage's config, for one replica."""
    version: str
    """Of lightopd, where the command was given."""
    folder: Path
    """That the command was given in: paths of the config start there."""
    token: Path | None
    """A file in the cache, there as long as the command runs; None for a cache at a URL."""
    host: str
    """That the command was given on, for people."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What an actor says of its replica."""

    host: str
    replica: str
    """Which process it is: another one, where Ray or its actor had to start it again."""
    outcome: Outcome | None
    """None while it works."""


class Actor:
    """Starts a replica, and says what became of it; the replica stops when this process ends.

    Ray makes it anew, on any node, when its process or its node died.

    Args:
        job: what the replica does.
        number: of the replica, from 1.
    """

    def __init__(self, job: Job, number: int) -> None:
        self._job, self._number = job, number
        self._refusal = refusal(job)
        self._killed = 0
        self._alive, self._held = os.pipe()
        self._files = tempfile.TemporaryDirectory(prefix="lightopd-actor-")
        self._replica = None if self._refusal else self._start()

    def watch(self) -> Seen:
        """What became of the replica, after a wait of a second at most."""
        outcome = self._outcome(WATCH_S)
        if outcome is not None and outcome.code < 0 and self._killed < KILLED_AGAIN:
            self._killed += 1
            self._replica, outcome = self._start(), None
        if outcome is not None:
            self._files.cleanup()
        process = self._replica.process.pid if self._replica else 0
        return Seen(socket.gethostname(), f"{os.getpid()} {process}", outcome)

    def stop(self, number: int) -> None:
        """Send the replica a signal and wait until it has ended."""
        if self._replica is not None and self._replica.process.poll() is None:
            self._replica.process.send_signal(number)
            self._outcome(GRACE_S)
        self._files.cleanup()

    def _start(self) -> Replica:
        os.chdir(self._job.folder)
        file = Path(self._files.name) / f"{self._job.stage}.yaml"
        file.write_text(self._job.config, encoding="utf-8")
        return start_replica(self._job.stage, file, self._number, dict(os.environ), self._alive)

    def _outcome(self, timeout_s: float) -> Outcome | None:
        if self._replica is None:
            return Outcome(self._number, ConfigError.exit_code, self._refusal)
        try:
            self._replica.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return outcome_of(self._replica)


def refusal(job: Job) -> str:
    """Why this node cannot do a job, in a line; empty where it can."""
    host = socket.gethostname()
    if job.version != __version__:
        return (
            f"node {host} has lightopd {__version__}, and {job.host}, where the command was given, "
            f"{job.version}; install one version on all"
        )
    if job.token is not None and not job.token.exists():
        return (
            f"node {host} does not see {job.token.parent.parent} as {job.host} does; put the cache on a "
            "folder that all nodes share under one path"
        )
    if not job.folder.is_dir():
        return (
            f"node {host} has no folder {job.folder}, where the command was given on {job.host}; give it in "
            "a folder that all nodes share"
        )
    return ""
