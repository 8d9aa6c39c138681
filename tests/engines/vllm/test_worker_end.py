"""vLLM's processes end with the process that started them, also where that was killed; here without vLLM."""

import subprocess
import sys

import pytest
from crowd import is_gone, until

WORKER = """
import os, time
import lightopd.engines.vllm.worker_end
print(os.getppid(), os.getpid(), flush=True)
time.sleep(600)
"""
ENGINE = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORKER!r}])"
STARTER = """
import os, subprocess, sys
from lightopd.engines.vllm.worker_end import this_starter
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, **this_starter()})
"""


@pytest.mark.parametrize("engine", [ENGINE, WORKER], ids=["two processes", "one process"])
def test_the_engine_and_its_worker_end_when_their_starter_is_killed(engine):
    words = [sys.executable, "-c", STARTER, engine]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as starter:
        pids = {int(word) for word in starter.stdout.readline().split()} - {starter.pid}
        assert not any(map(is_gone, pids))
        starter.kill()
    until(lambda: all(map(is_gone, pids)))
