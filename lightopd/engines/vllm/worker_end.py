"""What vLLM loads into each of its worker processes: vLLM ends when the process that started it has.

vLLM does not notice that its client was killed, and would keep its memory, and its GPU, for good. A worker is
the process of vLLM's engine itself, or a child of it.
"""

import os
import signal
import threading
import time

from lightopd.processes import parent_of, start_of

STARTER = "LIGHTOPD_VLLM_STARTER"
"""Variable with the process that starts vLLM: its number, and when it began."""
POLL_S = 1.0


class EndsWithStarter:
    """A base class that vLLM gives its worker; to bring this module into the process is all that it does."""


def this_starter() -> dict[str, str]:
    """The variable that names this process; nothing where the system does not say when it began."""
    began = start_of(os.getpid())
    return {} if began is None else {STARTER: f"{os.getpid()} {began}"}


def _watch(starter: str) -> None:
    number, _, began = starter.partition(" ")
    parent = os.getppid()
    is_engine = parent_of(parent) == int(number)
    while start_of(int(number)) == began:
        time.sleep(POLL_S)
    if is_engine and os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if STARTER in os.environ:
    threading.Thread(target=_watch, args=(os.environ[STARTER],), daemon=True, name="starter").start()
