"""Who holds a claim: a process, named so that others of its machine can tell whether it still lives."""

import os
import socket
import uuid
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue

from lightopd.processes import start_of, this_machine


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
        return self.machine == this_machine() != "" and start_of(self.pid) != self.started

    def as_json(self) -> dict[str, JsonValue]:
        """For a claim's content."""
        return asdict(self)


def this_process() -> Holder:
    """A new holder for the calling process."""
    started = start_of(os.getpid()) or ""
    return Holder(uuid.uuid4().hex, socket.gethostname(), this_machine(), os.getpid(), started)


def holder_of(plain: dict[str, Any]) -> Holder:
    """A holder from a claim's content.

    Raises:
        TypeError, KeyError: a field is missing.
    """
    return Holder(**{name: plain[name] for name in Holder.__dataclass_fields__})
