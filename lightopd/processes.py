"""Which process is meant by a number: numbers are used again, and each container has its own."""

import functools
import hashlib
from pathlib import Path

_PROC = Path("/proc")
_ENDED = ("Z", "X", "x")
"""States of a process that has ended and whose parent has not asked yet."""


@functools.cache
def this_machine() -> str:
    """Boot and process namespace: where two are equal, a process number means the same process.

    Containers differ here even where they have one host name. Empty where the system does not say.
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = (_PROC / "self/ns/pid").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def start_of(pid: int) -> str | None:
    """When a process of this machine began, in the machine's own ticks; None when it has ended."""
    told = _stat(pid)
    return told[19] if told and told[0] not in _ENDED else None


def parent_of(pid: int) -> int | None:
    """The process that a process of this machine belongs to; None when it is gone."""
    told = _stat(pid)
    return int(told[1]) if told else None


def _stat(pid: int) -> list[str]:
    """What the system says of a process, from its state on; nothing when it is gone."""
    try:
        # The name of the program, in brackets, may hold spaces and brackets.
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
