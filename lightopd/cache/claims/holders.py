"""Who holds a claim: a process, named so that others of its machine can tell whether it still lives."""

import functools
import hashlib
import os
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

_PROC = Path("/proc")
_ENDED = ("Z", "X", "x")
"""States of a process that has ended and whose parent has not asked yet."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that makes shards."""

    token: str
    """Random: no two holders have the same, in whatever process they are."""
    host: str
    """Name of its machine, for people."""
    machine: str
    """Boot and process namespace: where they are equal, a process number means the same process."""
    pid: int
    started: str
    """When the process began, in the machine's own ticks: process numbers are used again."""

    @property
    def name(self) -> str:
        """The holder in words, such as `process 4711 on gpu-box`."""
        return f"process {self.pid} on {self.host}"

    def is_gone(self) -> bool:
        """Whether its process has surely ended; one of another machine, or that is stopped, has not."""
        return self.machine == _machine() != "" and _start_of(self.pid) != self.started

    def as_json(self) -> dict[str, JsonValue]:
        """For a claim's content."""
        return asdict(self)


def this_process() -> Holder:
    """A new holder for the calling process."""
    started = _start_of(os.getpid()) or ""
    return Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), started)


def holder_of(plain: dict[str, Any]) -> Holder:
    """A holder from a claim's content.

    Raises:
        TypeError, KeyError: a field is missing.
    """
    return Holder(**{name: plain[name] for name in Holder.__dataclass_fields__})


@functools.cache
def _machine() -> str:
    """Empty where the system does not say; then nobody is known to be gone."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = (_PROC / "self/ns/pid").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def _start_of(pid: int) -> str | None:
    """When a process began; None when there is none of this number."""
    try:
        # The name of the program, in brackets, may hold spaces and brackets.
        state, *rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in _ENDED else rest[18]
