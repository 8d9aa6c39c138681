"""Replicas: several processes of one stage on this machine, each with an engine of its own.

They share the shards by claims, as processes on several machines do; the process that started them tells how
far they are together, ends them when it is stopped, and reports once.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightopd import errors
from lightopd.config import as_yaml
from lightopd.errors import ConfigError, EngineError, LightopdError
from lightopd.pipelines.shared.progress import StageProgress
from lightopd.pipelines.shared.reports import Report, report_of, save_report
from lightopd.schemas.configs import PrecomputeConfig, RolloutConfig
from lightopd.stopping import TERMINATED, Terminated
from lightopd.under_way import doing

log = logging.getLogger(__name__)

REPLICA = "LIGHTOPD_REPLICA"
"""Set in a replica: the pipe that closes when the process that started it ends."""
POLL_S = 0.2
GRACE_S = 20.0
"""Seconds that a replica has to let go of its claim and its engine when it is stopped."""
_COMMAND = "from lightopd.cli.main import main; main()"
_ERRORS = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LightopdError)
}


@dataclass(frozen=True, slots=True)
class _Replica:
    number: int
    process: "subprocess.Popen[bytes]"
    out: Path
    """What it prints: its report."""
    said: Path
    """What it says on stderr."""


def run_replicas(
    stage: str, config: RolloutConfig | PrecomputeConfig, folder: Path, num_shards: int
) -> Report:
    """Run a stage in `config.sharing.replicas` processes and report on all of them.

    A replica that fails is told of at once, and the others make its shards; the stage fails when all do.

    Args:
        stage: its command.
        config: of the stage.
        folder: where its shards appear.
        num_shards: how many there will be.

    Raises:
        LightopdError: what the first replica that failed said, with its exit code.
        KeyboardInterrupt: a replica was stopped, or this process was; all have ended.
    """
    environments = _environments(config)
    with tempfile.TemporaryDirectory(prefix="lightopd-replicas-") as name, _started() as replicas:
        alive, held = os.pipe()
        try:
            file = Path(name) / f"{stage}.yaml"
            sharing = config.sharing.model_copy(update={"replicas": 1})
            file.write_text(as_yaml(config.model_copy(update={"sharing": sharing})), encoding="utf-8")
            for number, environment in enumerate(environments, start=1):
                replicas.append(_start(stage, file, number, environment, alive))
            failures = _wait(stage, replicas, folder, num_shards)
            report = _report(stage, replicas, failures)
        finally:
            os.close(alive)
            os.close(held)
    save_report(report, config.cache if stage == "rollout" else folder)
    return report


def end_with_starter() -> None:
    """In a replica: stop when the process that started it is gone, however it ended.

    In an orderly way, and after `GRACE_S` in any case, as the starter would see to: SIGALRM is not caught and
    ends the process wherever it is.
    """
    if REPLICA not in os.environ:
        return
    alive = int(os.environ.pop(REPLICA))

    def wait() -> None:
        os.read(alive, 1)
        signal.alarm(round(GRACE_S))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="starter").start()


@contextlib.contextmanager
def _started() -> Iterator[list[_Replica]]:
    """A list of replicas, all of which have ended when the block has."""
    replicas: list[_Replica] = []
    try:
        yield replicas
    except BaseException as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        for replica in replicas:
            if replica.process.poll() is None:
                replica.process.send_signal(number)
        end_s = time.monotonic() + GRACE_S
        while any(each.process.poll() is None for each in replicas) and time.monotonic() < end_s:
            time.sleep(POLL_S)
        raise
    finally:
        for replica in replicas:
            if replica.process.poll() is None:
                replica.process.kill()
            replica.process.wait()


def _start(stage: str, config: Path, number: int, environment: dict[str, str], alive: int) -> _Replica:
    out, said = (config.with_name(f"{number}.{kind}") for kind in ("out", "said"))
    with out.open("wb") as stdout, said.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMMAND, stage, "-c", str(config), "--json"],
            env={**environment, REPLICA: str(alive)},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=(alive,),
            start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
        )
    return _Replica(number, process, out, said)


def _wait(stage: str, replicas: Sequence[_Replica], folder: Path, num_shards: int) -> dict[int, str]:
    """Tell how far all are until all have ended; what those that failed said, by number."""
    progress: StageProgress | None = None
    failures: dict[int, str] = {}
    while True:
        is_over = all(replica.process.poll() is not None for replica in replicas)
        for replica in replicas:
            if replica.process.poll() and replica.number not in failures:
                failures[replica.number] = _failure(replica)
                log.warning("replica %d of %d: %s", replica.number, len(replicas), failures[replica.number])
        there = sum(1 for _ in folder.glob("part-*.json"))
        progress = progress or StageProgress(stage, None, "shards", num_shards, there)
        for _ in range(there - progress.done):
            progress.advance(is_own=False)
        if is_over:
            return failures
        with doing(
            f"{stage}: {len(replicas) - len(failures)} replicas at work, {there} of {num_shards} shards"
        ):
            time.sleep(POLL_S)


def _failure(replica: _Replica) -> str:
    code, lines = replica.process.returncode, replica.said.read_text(errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith(("error: ", "stopped"))]
    if code < 0:
        return f"killed ({signal.Signals(-code).name}), often for want of memory"
    return f"{(told or lines or ['it said nothing'])[-1]} (exit code {code})"


def _report(stage: str, replicas: Sequence[_Replica], failures: dict[int, str]) -> Report:
    """The report of a replica that ended well, all of which speak of the whole; raises when none has."""
    well = [replica for replica in replicas if replica.number not in failures]
    if not well:
        first = min(failures)
        code = replicas[first - 1].process.returncode
        if code in (TERMINATED, 130):
            raise Terminated if code == TERMINATED else KeyboardInterrupt
        same = sum(each == failures[first] for each in failures.values())
        raise _ERRORS.get(code, EngineError)(
            f"all {len(replicas)} replicas failed, {same} of them alike; replica {first}: {failures[first]}"
        )
    report = report_of(json.loads(well[-1].out.read_text(encoding="utf-8")))
    notes = tuple(
        f"replica {number} failed: {told}; the others made its shards"
        for number, told in sorted(failures.items())
    )
    figures = {name: value for name, value in report.figures.items() if name != "tokens_per_s"}
    return replace(
        report, stage=stage, figures={**figures, "replicas": len(replicas)}, notes=(*report.notes, *notes)
    )


def _environments(config: RolloutConfig | PrecomputeConfig) -> list[dict[str, str]]:
    """The environment of each replica: its own part of the GPUs, or of the processor's cores."""
    count, each = config.sharing.replicas, _devices_of(config)
    devices = _visible_devices() if each else []
    if not devices:
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
        return [{**threads, **os.environ} for _ in range(count)]
    if len(devices) < count * each:
        raise ConfigError(
            f"{count} replicas of {each} GPU{'s' * (each > 1)} need {count * each}, and {len(devices)} are "
            f"visible; "
            f"set sharing.replicas to {len(devices) // each or 1} or fewer"
        )
    parts = [devices[i * each : (i + 1) * each] for i in range(count)]
    return [{**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(part)} for part in parts]


def _devices_of(config: RolloutConfig | PrecomputeConfig) -> int:
    """GPUs that one replica takes, where there are any; 0 for a server elsewhere, and on the CPU."""
    engine = config.engine
    if engine.kind == "vllm":
        return engine.tensor_parallel_size * engine.pipeline_parallel_size
    if engine.kind == "hf" and ":" in engine.device:
        raise ConfigError(
            f"engine.device is {engine.device}, and each replica takes a GPU of its own; leave it out, and "
            "name the GPUs in CUDA_VISIBLE_DEVICES"
        )
    return int(engine.kind == "hf" and engine.device != "cpu")


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
