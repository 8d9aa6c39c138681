"""Runs of several ranks without the seconds that each would spend importing, and one rank alone."""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

# Importing takes longer than a small run: every rank is a fork of a process that has only imported.
NURSERY = """
import json, os, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightopd.cache.store import open_cache
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.fit import fit
def run(job):
    before = job["continue_from"]
    fit(
        open_cache(Path(job["cache"])),
        ModelConfig(path=job["student"]),
        Path(job["out"]),
        FinetuneConfig.model_validate(job["settings"]),
        ObjectiveConfig.model_validate(job["objective"]),
        continue_from=None if before is None else Path(before),
    )
def born(job, variables):
    pid = os.fork()
    if pid == 0:
        os.environ |= variables
        try:
            run(job)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid
for line in sys.stdin:
    job = json.loads(line)
    pids = [born(job, variables) for variables in job["ranks"]]
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in {*pids} - {*codes} if codes[pid] else ():  # it would wait for this one
            os.kill(other, 9)
    print(json.dumps([codes[pid] for pid in pids]), flush=True)
"""


class Ranks:
    """Function that calls `fit` in one process for each device, as a launcher would; all must end well."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY], env=environment, text=True, **pipes)

    def __call__(self, cache, student, out, objective=(), continue_from=None, **settings):
        job = {
            "cache": str(cache.path),
            "student": str(student),
            "out": str(out),
            "objective": dict(objective),
            "continue_from": continue_from and str(continue_from),
            "settings": {"accelerator": "cpu", **settings},
            "ranks": variables(settings.get("devices", 1)),
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        assert set(json.loads(self.process.stdout.readline())) == {0}


def variables(count):
    """What a launcher tells each rank; nothing where there is one."""
    if count == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [
        common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        for rank in range(count)
    ]


@contextmanager
def as_rank(rank, count):
    """A mesh of so many devices as one of its ranks sees it; nobody else is there."""
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()
