"""SIGTERM, as Slurm, Kubernetes and `timeout` send it, ends a run as Ctrl-C does."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

Value = TypeVar("Value")

TERMINATED = 143
"""Exit code after SIGTERM, as shells count: 128 and the signal's number."""
GRACE_S = 5.0
"""Seconds that a stop waits for the step that is being made."""
LISTEN_S = 0.1
"""Seconds until Ctrl-C is heard while another thread is waited for."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; whatever cleans up after Ctrl-C cleans up after it."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM raises `Terminated` in the main thread; further ones do not disturb the cleaning up.

    Processes that are forked meanwhile, such as a loader's workers, die of SIGTERM as before. Outside the
    main thread, where Python takes no handlers, nothing is changed.

    Yields:
        Whether SIGTERM has arrived: a library between may turn the exception into a plain KeyboardInterrupt.
    """
    arrived = False
    process = os.getpid()

    def on_sigterm(number: int, _: object) -> None:
        nonlocal arrived
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not arrived:
            arrived = True
            raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield lambda: arrived
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stops_wait(grace_s: float = GRACE_S) -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C and SIGTERM take effect where the caller allows it, or after a grace period.

    A second signal takes effect at once. Outside the main thread, and for a signal that is ignored, nothing
    is changed.

    Args:
        grace_s: seconds that a signal waits at most.

    Yields:
        Function to call where a stop does no harm; it raises what the signal would have raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    process = os.getpid()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if callable(handler)}
    waiting: list[tuple[signal.Signals, threading.Timer]] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if waiting or os.getpid() != process:
            before[signal.Signals(number)](number, frame)
            return
        timer = threading.Timer(grace_s, os.kill, (process, number))
        timer.daemon = True
        waiting.append((signal.Signals(number), timer))
        timer.start()

    def allow() -> None:
        if waiting:
            number, timer = waiting[0]
            timer.cancel()
            before[number](number, None)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield allow
    finally:
        for _, timer in waiting:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM wait for the end of the block; for short steps beside other threads.

    Python's own conditions, events and futures have a moment in which their lock is taken and nothing would
    release it: what a signal raises there leaves the other thread waiting for ever, and whoever joins it.
    Outside the main thread, and for a signal that is ignored, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    arrived: list[signal.Signals] = []
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in found.items() if callable(handler)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            arrived.append(signal.Signals(number))
        else:
            before[signal.Signals(number)](number, frame)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            before[arrived[0]](arrived[0], None)


def result_of(future: "Future[Value]") -> Value:
    """What another thread's call returns or raises, once it has ended; Ctrl-C and SIGTERM end the wait."""
    while True:
        with undisturbed():
            is_done = bool(wait([future], timeout=LISTEN_S).done)
        if is_done:
            with undisturbed():
                return future.result()
