"""SIGTERM, as Slurm, Kubernetes and `timeout` send it, ends a run as Ctrl-C does."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

TERMINATED = 143
"""Exit code after SIGTERM, as shells count: 128 and the signal's number."""


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
