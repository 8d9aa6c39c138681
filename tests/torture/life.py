"""One life of the command: a fork of this process, which has imported everything, hurt and waited for."""

import atexit
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from hurts import FAULTS, SIGNAL, Hurt, arm, calls_and_hits

PATIENCE_S = 120.0
"""A life that takes longer hangs."""
NAP_S = 0.1


@dataclass(frozen=True)
class Life:
    """How a life ended."""

    code: int
    """Exit code; a signal's number, negative, where one ended it."""
    err: str
    calls: int
    is_hit: bool
    """Whether the fault came: a life may end before its moment."""
    seconds: float
    cpu_s: float
    modules: list[str]
    """What it had to import."""


def live(words: list[str], folder: Path, hurt: Hurt | None, *, is_clock_back: bool = False) -> Life:
    """Run `lightopd WORDS` in a fork, hurt it, and wait for its end.

    Args:
        words: arguments of the command.
        folder: where calls count; the fork's standard error and its counts are kept beside it.
        hurt: what happens to it.
        is_clock_back: the whole life is an hour ago.
    """
    err, counts = folder.with_name("err.txt"), folder.with_name("counts.json")
    counts.unlink(missing_ok=True)
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_the_command(words, folder, hurt, err, counts, is_clock_back)
    code, is_sent, cpu_s = _wait(pid, hurt, begin)
    seconds = time.monotonic() - begin
    told = json.loads(counts.read_text()) if counts.exists() else {"calls": 0, "hits": 0, "modules": []}
    is_signal = hurt is not None and FAULTS[hurt.fault].what == SIGNAL
    # The process may have ended on its own between its moment and the signal.
    is_hit = bool(told["hits"]) or (is_signal and (code != 0 or (is_sent and hurt.fault == "SIGSTOP")))
    return Life(code, err.read_text(), told["calls"], is_hit, seconds, cpu_s, told["modules"])


def _be_the_command(
    words: list[str], folder: Path, hurt: Hurt | None, err: Path, counts: Path, is_clock_back: bool
) -> None:
    """In the fork: become the command, to its end; the interpreter's own taking down is left out."""
    from lightopd.cli.main import main

    for number, path in ((0, os.devnull), (1, os.devnull), (2, err)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    known = set(sys.modules)
    sys.argv = ["lightopd", *words]
    arm(folder, hurt, is_clock_back=is_clock_back)
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # noqa: BLE001 - the interpreter prints whatever comes this far
        traceback.print_exc()
        code = 1
    _end(code, counts, known)


def _end(code: int, counts: Path, known: set[str]) -> None:
    """As the interpreter ends: threads, what was registered for the end, streams."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    _tell(counts, known)
    os._exit(code)


def _tell(counts: Path, known: set[str]) -> None:
    calls, hits = calls_and_hits()
    modules = [name for name in sys.modules if name not in known]
    counts.write_text(json.dumps({"calls": calls, "hits": hits, "modules": modules}))


def _is_in_command(pid: int) -> bool:
    """Whether a process listens to SIGTERM, as it does from the command's first line to its last."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _wait(pid: int, hurt: Hurt | None, begin: float) -> tuple[int, bool, float]:
    """Waits for the end: exit code, whether a signal was seen to be there, and seconds of a core."""
    is_sent, is_due = False, hurt is not None and hurt.after_s is not None
    while True:
        found, status, used = os.wait4(pid, os.WNOHANG | os.WUNTRACED)
        if found and os.WIFSTOPPED(status):
            time.sleep(NAP_S)
            os.kill(pid, signal.SIGCONT)
            is_sent = True
        elif found:
            return os.waitstatus_to_exitcode(status), is_sent, used.ru_utime + used.ru_stime
        elapsed = time.monotonic() - begin
        if is_due and elapsed > hurt.after_s and _is_in_command(pid):
            os.kill(pid, FAULTS[hurt.fault].number)
            is_sent, is_due = True, False
        if elapsed > PATIENCE_S:
            os.kill(pid, signal.SIGUSR1)  # where does it hang
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            begin = time.monotonic()
        time.sleep(0.005)
