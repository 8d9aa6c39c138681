"""What can happen to a running stage, and when."""

import ctypes
import errno
import random
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

# As in shim.c.
NONE, SIGNAL, FAIL_ON, FAIL_ONCE, CLOCK_BACK = range(5)
DATA, SYNC, CREATE, OPEN, FOLDER, RENAME, LINK, REMOVE, CUT = (1 << bit for bit in range(9))

STOPPED = 130
TERMINATED = 143
CANNOT_WRITE = 7
HOUR_S = 3600


@dataclass(frozen=True)
class Fault:
    """A kind of harm: what the shim does with it, and the exit codes with which a process may answer."""

    what: int
    number: int
    codes: tuple[int, ...]
    kinds: int = 0
    says: tuple[str, ...] = ()
    """One of these stands in the message of a process that ended with a code other than 0."""


STOP_MESSAGE = ("run the same command again to resume",)
DISK_MESSAGE = ("cannot write", "No space left", "Input/output error", "Read-only file system")
FAULTS = {
    "SIGKILL": Fault(SIGNAL, signal.SIGKILL, (-signal.SIGKILL,)),
    "SIGTERM": Fault(SIGNAL, signal.SIGTERM, (TERMINATED,), says=STOP_MESSAGE),
    "SIGINT": Fault(SIGNAL, signal.SIGINT, (STOPPED,), says=STOP_MESSAGE),
    "SIGSTOP": Fault(SIGNAL, signal.SIGSTOP, (0,)),
    "ENOSPC": Fault(
        FAIL_ON, errno.ENOSPC, (0, CANNOT_WRITE), DATA | CREATE | FOLDER | LINK, says=DISK_MESSAGE
    ),
    "EIO": Fault(FAIL_ONCE, errno.EIO, (0, CANNOT_WRITE), DATA | SYNC, says=DISK_MESSAGE),
    "read-only": Fault(
        FAIL_ON,
        errno.EROFS,
        (0, CANNOT_WRITE),
        DATA | CREATE | OPEN | FOLDER | RENAME | LINK | REMOVE | CUT,
        says=DISK_MESSAGE,
    ),
    "clock back": Fault(CLOCK_BACK, HOUR_S, (0,)),
    "kill, clock back": Fault(SIGNAL, signal.SIGKILL, (-signal.SIGKILL,)),
}
"""The last: it is killed, and the resume lives an hour before the files that it finds."""


@dataclass(frozen=True)
class Hurt:
    """One fault at one moment of one life."""

    fault: str
    call: int
    """Number of the call that changes the folder, from 1; 0 where the moment is a time."""
    after_s: float | None = None

    def __str__(self) -> str:
        moment = f"call {self.call}" if self.after_s is None else f"{self.after_s:.2f} s"
        return f"{self.fault} at {moment}"


def drawn(chance: random.Random, fault: str, calls: int, seconds: float) -> Hurt:
    """A moment for a fault in a life of so many calls and seconds; one signal in four comes by time."""
    call, after_s = chance.randint(1, calls), chance.uniform(0, seconds)
    if FAULTS[fault].what == SIGNAL and chance.random() < 0.25:
        return Hurt(fault, 0, after_s)
    return Hurt(fault, call)


def compile_shim(folder: Path) -> Path:
    """The shim as a library, made by the machine's C compiler.

    Raises:
        FileNotFoundError: there is no C compiler.
        subprocess.CalledProcessError: it cannot make the library.
    """
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def arm(folder: Path, hurt: Hurt | None, *, is_clock_back: bool = False) -> None:
    """In the process that is to be hurt: from here on its calls are counted, and the fault comes."""
    if hurt is None or hurt.call == 0:
        what = CLOCK_BACK if is_clock_back else NONE
        _shim().hurt_arm(bytes(folder), ctypes.c_long(0), what, HOUR_S, 0)
        return
    fault = FAULTS[hurt.fault]
    _shim().hurt_arm(bytes(folder), ctypes.c_long(hurt.call), fault.what, fault.number, fault.kinds)


def calls_and_hits() -> tuple[int, int]:
    """Calls that this process made so far, and how many of them were hurt."""
    shim = _shim()
    shim.hurt_calls.restype = shim.hurt_hits.restype = ctypes.c_long
    return shim.hurt_calls(), shim.hurt_hits()


def _shim() -> ctypes.CDLL:
    return ctypes.CDLL(None)
