"""Processes to be killed: forks of one that has imported everything, as importing takes longer than a run."""

import contextlib
import os
import subprocess
import sys
import time

NURSERY = """
import os, sys, traceback
import torch
torch.set_num_threads(1)
{prepare}
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            live(line.strip())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def nursery(prepare, *arguments):
    """A process that forks a life for each line it reads.

    `prepare` is code that imports, reads `arguments` from `sys.argv[1:]` and defines `live(line)`; it may not
    start threads.
    """
    words = [sys.executable, "-c", NURSERY.replace("{prepare}", prepare), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


def life(nursery, line, until=lambda: False):
    """One life, killed as soon as the condition holds; its exit code."""
    nursery.stdin.write(f"{line}\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline())
    while not until():
        if is_gone(pid):
            break
        time.sleep(0.001)
    else:
        with contextlib.suppress(ProcessLookupError):  # it ended in this moment
            os.kill(pid, 9)
    return int(nursery.stdout.readline())


def is_gone(pid):
    """Whether the process has ended and its parent knows."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
