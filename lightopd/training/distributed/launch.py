"""One process per device: who starts them, what they say to each other, and that they end together.

A run on several devices is the same command once more for each of them. `torchrun`, SLURM or the user starts
these processes and tells each its rank; where nobody has, `start_workers` does, and its process only waits.
So the process that holds the run's folder and prints its report computes nothing and no device can take it
down: when a worker fails or is killed, it ends the others and says why in one line.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lightopd import errors
from lightopd.errors import ConfigError, LightopdError, TrainingError
from lightopd.ranks import WORKER, is_worker, rank_here
from lightopd.schemas.finetune import FinetuneConfig

POLL_S = 0.05
"""Between two looks at the workers."""
GRACE_S = 5.0
"""What the other workers have to end by themselves after one has ended with an error, or after Ctrl-C."""
PIPE_BYTES = 65_536
"""A pipe takes so much without a reader."""
MESSAGE_CHARACTERS = 5_000
"""Most of an error that is handed over."""


@dataclass(frozen=True, slots=True)
class _Worker:
    rank: int
    process: "subprocess.Popen[bytes]"
    report: int
    """Where its report is read."""


def must_start(finetune: FinetuneConfig) -> bool:
    """Whether this process is to start those of the devices, because nobody else did.

    Raises:
        ConfigError: `torchrun` or SLURM started another number of processes than the settings say, or
            there are several nodes and this one was not told where the others are.
    """
    wanted = finetune.devices * finetune.nodes
    if rank_here() is None:
        if finetune.nodes > 1:
            _check_node(finetune.nodes)
        return wanted > 1
    started = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", wanted)))
    if started != wanted:
        raise ConfigError(
            f"{started} processes were started, and devices is {finetune.devices} on {finetune.nodes} nodes: "
            f"give --devices and --nodes so that their product is {started}; under SLURM start one task for "
            "each device with srun"
        )
    return False


def start_workers(finetune: FinetuneConfig) -> dict[str, Any]:
    """Run this command once for each device of this node, and wait until all are done.

    Returns:
        What the worker of rank 0 handed to `report`; empty on other nodes.

    Raises:
        LightopdError: what the worker said that failed.
        TrainingError: a worker was killed.
        RuntimeError: a worker failed by a mistake of ours; the message has its traceback.
        KeyboardInterrupt: Ctrl-C; all workers have ended.
    """
    reading, writing = os.pipe()
    workers: list[_Worker] = []
    try:
        common = _environment(finetune)
        for local in range(finetune.devices):
            workers.append(_start(common, local, finetune.devices, reading))
        _wait(workers)
        return next((_report_of(worker) for worker in workers if worker.rank == 0), {})
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.send_signal(signal.SIGINT)
        _leave_time(workers)
        raise
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            os.close(worker.report)
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def as_worker() -> Iterator[None]:
    """In a worker: end when the process that started it ends, and hand it errors instead of showing them.

    In any process but the first of a run, only errors are logged: the first one says the rest.
    """
    if rank_here():
        logging.getLogger("lightopd").setLevel(logging.ERROR)
    if not is_worker():
        yield
        return
    # Until here Ctrl-C is ignored: in the middle of an import it could only end in a traceback.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(_pipes()[1],), daemon=True).start()
    sys.excepthook = _hand_over_mistake
    try:
        yield
    except (KeyboardInterrupt, LightopdError) as error:
        name = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        report({"error": name, "message": str(error)[:MESSAGE_CHARACTERS]})
        _leave(getattr(error, "exit_code", 130))


def _hand_over_mistake(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    lines = traceback.format_exception(kind, error, trace)
    report({"error": "", "message": "".join(lines)[-MESSAGE_CHARACTERS:]})
    _leave(1)


def report(values: Mapping[str, Any]) -> None:
    """Hand something to the process that started this worker; nothing in any other process."""
    if is_worker():
        os.write(_pipes()[0], json.dumps(values).encode() + b"\n")


def _pipes() -> tuple[int, int]:
    to_report, alive = os.environ[WORKER].split(",")
    return int(to_report), int(alive)


def _end_with(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _leave(code: int) -> None:
    """End at once: an orderly end would wait for collectives that the other ranks no longer answer."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def _check_node(nodes: int) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"nodes is {nodes}, without {', '.join(missing)} in the environment: start the command on every "
            "node with MASTER_ADDR (the first node), MASTER_PORT (a free port there) and NODE_RANK (0 on the "
            "first), or with torchrun or srun"
        )


def _environment(finetune: FinetuneConfig) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // finetune.devices)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "WORLD_SIZE": str(finetune.devices * finetune.nodes),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(common: Mapping[str, str], local: int, devices: int, alive: int) -> _Worker:
    rank = int(common["NODE_RANK"]) * devices + local
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(local), WORKER: f"{writing},{alive}"}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**common, **ranks},
            stdout=subprocess.DEVNULL,
            pass_fds=(writing, alive),
        )
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(writing)
    return _Worker(rank, process, reading)


def _wait(workers: Sequence[_Worker]) -> None:
    """Return when all have ended well; raise for the worker that was the first cause when one has not."""
    while True:
        codes = [worker.process.poll() for worker in workers]
        if any(codes):
            _leave_time(workers)
            raise _cause(workers)
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_S)


def _leave_time(workers: Sequence[_Worker]) -> None:
    end_s = time.monotonic() + GRACE_S
    while any(worker.process.poll() is None for worker in workers) and time.monotonic() < end_s:
        time.sleep(POLL_S)


def _cause(workers: Sequence[_Worker]) -> BaseException:
    """The error to raise: what one worker says, else that one was killed, else what broke in one.

    A worker whose neighbour has gone fails in the middle of a collective; that is no cause.
    """
    ended = [(worker, worker.process.poll()) for worker in workers]
    reports = [_report_of(worker) for worker, code in ended if code]
    for name in ("KeyboardInterrupt", *_LIGHTOPD_ERRORS):
        for found in reports:
            if found.get("error") == name:
                return _LIGHTOPD_ERRORS.get(name, KeyboardInterrupt)(found["message"])
    for worker, code in ended:
        if code is not None and code < 0:
            return TrainingError(
                f"the process of rank {worker.rank} was killed ({signal.Signals(-code).name}), often for "
                "want of memory; the others were ended too; run the same command again to resume from the "
                "last checkpoint"
            )
    for found in reports:
        if "message" in found:
            return RuntimeError(f"a worker failed:\n{found['message']}")
    rank, code = next((worker.rank, code) for worker, code in ended if code)
    return TrainingError(f"the process of rank {rank} ended with exit code {code}; what it said stands above")


_LIGHTOPD_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, LightopdError)
}


def _report_of(worker: _Worker) -> dict[str, Any]:
    try:
        lines = os.read(worker.report, PIPE_BYTES).splitlines()
    except BlockingIOError:
        return {}
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found
