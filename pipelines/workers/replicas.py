"""Replicas: several processes of one stage on this machine, each with an engine of its own.

They share the shards by claims, as processes on several machines do; the process that started them tells how
far they are together, ends them when it is stopped, and reports once.
"""

import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightopd.cache.buckets.places import place_of
from lightopd.config import as_yaml
from lightopd.errors import ConfigError
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.workers.replica import (
    GRACE_S,
    POLL_S,
    JointProgress,
    Outcome,
    Replica,
    joint_report,
    outcome_of,
    start_replica,
)
from lightopd.schemas.configs import PrecomputeConfig, RolloutConfig
from lightopd.stopping import Terminated

log = logging.getLogger(__name__)


def run_replicas(
    stage: str, config: RolloutConfig | PrecomputeConfig, folder: Path, num_shards: int
) -> Report:
    """Run a stage in `config.sharing.replicas` processes and report on all of them; see `run_crowd`.

    A replica that fails is told of at once, and the others make its shards; the stage fails when all do.
    """
    environments = _environments(config)
    with tempfile.TemporaryDirectory(prefix="lightopd-replicas-") as name, _started() as replicas:
        alive, held = os.pipe()
        try:
            file = Path(name) / f"{stage}.yaml"
            file.write_text(as_yaml(one_replica_of(config)), encoding="utf-8")
            for number, environment in enumerate(environments, start=1):
                replicas.append(start_replica(stage, file, number, environment, alive))
            return joint_report(stage, _wait(replicas, JointProgress(stage, folder, num_shards)))
        finally:
            os.close(alive)
            os.close(held)


def one_replica_of(config: RolloutConfig | PrecomputeConfig) -> RolloutConfig | PrecomputeConfig:
    """The config that each of the replicas runs with; a URL in it is no machine's mirror."""
    sharing = config.sharing.model_copy(update={"replicas": 1, "execution": "local"})
    place = place_of(config.cache)
    cache = config.cache if place is None else Path(place.url)
    return config.model_copy(update={"sharing": sharing, "cache": cache})


@contextlib.contextmanager
def _started() -> Iterator[list[Replica]]:
    """A list of replicas, all of which have ended when the block has."""
    replicas: list[Replica] = []
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


def _wait(replicas: Sequence[Replica], progress: JointProgress) -> list[Outcome]:
    """Tell how far all are until all have ended; what became of them."""
    outcomes: dict[int, Outcome] = {}
    while True:
        for replica in replicas:
            if replica.number not in outcomes and (outcome := outcome_of(replica)) is not None:
                outcomes[replica.number] = outcome
                if outcome.code:
                    log.warning("replica %d of %d: %s", replica.number, len(replicas), outcome.told)
        progress.tell()
        if len(outcomes) == len(replicas):
            return list(outcomes.values())
        failed = sum(1 for outcome in outcomes.values() if outcome.code)
        with progress.at_work(len(replicas) - failed):
            time.sleep(POLL_S)


def _environments(config: RolloutConfig | PrecomputeConfig) -> list[dict[str, str]]:
    """The environment of each replica: its own part of the GPUs, or of the processor's cores."""
    count, each = config.sharing.replicas, devices_of(config)
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


def devices_of(config: RolloutConfig | PrecomputeConfig) -> int:
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
