"""Several `lightopd` commands at once: forks of one process that has imported everything.

A fork starts in no time, so that the commands truly work side by side on a tiny model.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightopd.cache.claims.store import FolderStore
from lightopd.processes import start_of

SERVER = """
import itertools, os, signal, sys
import torch
torch.set_num_threads(1)
import transformers, lightopd.pipelines.rollout, lightopd.pipelines.precompute, lightopd.engines.hf.engine
from transformers import Qwen3ForCausalLM
from lightopd.cli.main import main
from lightopd.pipelines.workers.shared_shards import SharedShards
claimed, numbers = SharedShards.claimed, itertools.count()
def claimed_with_a_sleep(at, *arguments):
    for index in claimed(*arguments):
        if next(numbers) == at:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield index
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
        if words[2]:
            SharedShards.claimed = lambda *arguments: claimed_with_a_sleep(int(words[2]), *arguments)
        sys.argv = ["lightopd", *words[3:]]
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

    def wait_asleep(self):
        """Wait until it has stopped itself."""
        until(lambda: is_asleep(self.pid) or is_gone(self.pid))
        assert not is_gone(self.pid), Path(f"{self._said}.err").read_text()

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


@contextlib.contextmanager
def crowd(folder):
    """A function that starts `lightopd` with the given arguments and returns its `Command` at once.

    `user` is the folder of the command's own user cache, as if it were on another machine. With `sleeps_at`
    the command stops itself when it has claimed so many shards and one more.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, text=True, **pipes) as server:
        commands = []

        def start(*arguments, user="", sleeps_at=""):
            said = folder / f"said-{len(commands)}"
            pid = int(ask(server, "start", said, user, sleeps_at, *arguments))
            commands.append(Command(server, said, pid))
            return commands[-1]

        yield start
        for command in commands:
            if command._code is None:
                for number in (signal.SIGCONT, signal.SIGKILL):
                    command.send(number)
                command.wait()
        server.stdin.close()


def until(condition, timeout_s=300.0):
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
    return [int(child) for told in _told_of_threads(pid, "children") for child in told.split()]


def is_gone(pid):
    """Whether a process has ended, asked for or not."""
    return start_of(pid) is None


def is_asleep(pid):
    """Whether a signal has stopped every thread of a process."""
    stats = _told_of_threads(pid, "stat")
    return bool(stats) and all(stat.rpartition(")")[2].split()[:1] == ["T"] for stat in stats)


def _told_of_threads(pid, name):
    told = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it, or one of its threads, has ended
        for file in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
            told.append("")
            told[-1] = file.read_text()
    return told


def stopped_in_the_middle(cache, kind, timeout_s=300.0, *, is_first=True):
    """A process that makes shards of a part, is in the middle of one, and sleeps from now on.

    Unless it may be its first one, the process has finished another, which is seen in its hands.
    """
    store, found, in_hand = FolderStore(cache / ".lightopd.claims", kind), [], {}

    def is_there(key):
        return (cache / kind / f"{key}.json").exists()

    def is_caught():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # claims or process are gone
            for key in store.all_keys():
                content = store.read(key) if key.startswith("part-") else None
                if content is None or is_there(key):
                    continue
                pid = json.loads(content)["pid"]
                in_hand.setdefault(pid, set()).add(key)
                if (is_first or any(map(is_there, in_hand[pid]))) and sleeps_with(pid, key, content):
                    found.append(pid)
                    return True
        return False

    def sleeps_with(pid, key, content):
        os.kill(pid, signal.SIGSTOP)
        until(lambda: is_asleep(pid) or is_gone(pid))
        if store.read(key) == content and not is_there(key):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    until(is_caught, timeout_s)
    return found[0]
