"""Several `lightopd` commands at once: forks of one process that has imported everything.

A fork starts in no time, so that the commands truly work side by side on a tiny model.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from lightopd.cache.claims.store import FolderStore

SERVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import transformers, lightopd.pipelines.rollout, lightopd.pipelines.precompute, lightopd.engines.hf.engine
from transformers import Qwen3ForCausalLM
from lightopd.cli.main import main
for line in sys.stdin:
    kind, *words = line.rstrip("\\n").split("\\0")
    if kind == "wait":
        print(os.waitstatus_to_exitcode(os.waitpid(int(words[0]), 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {"XDG_CACHE_HOME": words[1]} if words[1] else {}
        os.dup2(os.open(words[0] + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open(words[0] + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["lightopd", *words[2:]]
        code = 1
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""


class Command:
    """One command of a crowd."""

    def __init__(self, server, said, pid):
        self._server, self._said, self.pid = server, said, pid
        self._code = None

    def send(self, number):
        """Send the process a signal."""
        os.kill(self.pid, number)

    def wait(self):
        """The exit code, and what it said on stderr."""
        if self._code is None:
            self._code = int(ask(self._server, "wait", self.pid))
        return self._code, Path(f"{self._said}.err").read_text()

    @property
    def out(self):
        """What it printed."""
        return Path(f"{self._said}.out").read_text()


def ask(server, *words):
    server.stdin.write("\0".join(map(str, words)) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


@contextmanager
def crowd(folder):
    """A function that starts `lightopd` with the given arguments and returns its `Command` at once.

    `user` is the folder of the command's own user cache, as if it were on another machine.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, **pipes) as server:
        commands = []

        def start(*arguments, user=""):
            said = folder / f"said-{len(commands)}"
            commands.append(Command(server, said, int(ask(server, "start", said, user, *arguments))))
            return commands[-1]

        yield start
        for command in commands:
            if command._code is None:
                for number in (signal.SIGCONT, signal.SIGKILL):
                    command.send(number)
                command.wait()
        server.stdin.close()


def until(condition, timeout_s=60.0):
    """Wait for something to become true."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come true in time"
        time.sleep(0.002)


def begin(*arguments, **environment):
    """`lightopd` with the given arguments, as a process that has to import everything."""
    return subprocess.Popen(
        [Path(sys.executable).with_name("lightopd"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
    )


def shards_of(folder):
    """Bytes of the shards and markers of a part, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def children_of(pid):
    """Processes that a process started."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(each) for started in threads for each in started.read_text().split()]


def is_gone(pid):
    """Whether a process has ended, asked for or not."""
    return not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def stopped_in_the_middle(cache, kind, timeout_s=300.0):
    """A process that makes shards of a part, is in the middle of one, and sleeps from now on."""
    store, found = FolderStore(cache / ".lightopd.claims", kind), []

    def is_caught():
        for key in store.all_keys():
            content = store.read(key) if key.startswith("part-") else None
            if content is None:
                continue
            pid = json.loads(content)["pid"]
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)
            if store.read(key) == content:
                found.append(pid)
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    until(is_caught, timeout_s)
    return found[0]
