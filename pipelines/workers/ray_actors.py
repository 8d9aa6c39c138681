"""Replicas as actors of a Ray cluster, each with an engine of its own on resources of its own.

An actor is a process that joins by the claims, as a process of another machine does: it runs the stage's own
command on the folder that all nodes share. Ray places the actors, starts them again when they or their
nodes die, and takes nodes that come later. What is written is decided by the claims alone.
"""

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightopd import __version__
from lightopd.config import as_yaml
from lightopd.errors import ConfigError, EngineError
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.workers.actor import WATCH_S, Actor, Job, Seen
from lightopd.pipelines.workers.ray_cluster import connected, seen_by_all
from lightopd.pipelines.workers.replica import GRACE_S, POLL_S, JointProgress, Outcome, joint_report
from lightopd.pipelines.workers.replicas import devices_of, one_replica_of
from lightopd.schemas.configs import PrecomputeConfig, RolloutConfig
from lightopd.stopping import Terminated

log = logging.getLogger(__name__)

RESTARTS = 10
"""Times that Ray starts an actor again."""
SETTLE_S = 5 * WATCH_S
"""Once all shards are there, seconds for which an actor may say nothing."""
PLACING_S = 30.0
"""Seconds without a place for an actor after which it is told."""


@dataclass(slots=True)
class _Seat:
    """An actor, as the process that started it sees it."""

    number: int
    actor: Any
    answer: Any
    """Of Ray: what `Actor.watch` will say."""
    host: str = ""
    """Of its node; empty while it has none."""
    heard_s: float = field(default_factory=time.monotonic)
    process: str = ""
    """Which replica it watched when it was heard last."""
    restarts: int = 0
    outcome: Outcome | None = None


def run_actors(stage: str, config: RolloutConfig | PrecomputeConfig, folder: Path, num_shards: int) -> Report:
    """Run a stage in `config.sharing.replicas` actors and report on all of them; see `run_crowd`."""
    count = config.sharing.replicas
    with connected() as ray, seen_by_all(config.cache) as token:
        needs = _needs(ray, config)
        text = as_yaml(one_replica_of(config))
        job = Job(stage, text, __version__, Path.cwd(), token, socket.gethostname())
        actors = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **needs)(Actor)
        with _seated(ray) as seats:
            for number in range(1, count + 1):
                actor = actors.remote(job, number)
                seats.append(_Seat(number, actor, actor.watch.remote()))
            _wait(ray, seats, JointProgress(stage, folder, num_shards), needs)
            notes = [note for seat in seats for note in _notes(seat)]
            return joint_report(stage, [seat.outcome for seat in seats if seat.outcome], notes)


def _needs(ray: Any, config: RolloutConfig | PrecomputeConfig) -> dict[str, int]:
    """What Ray sets aside for each actor; refused where no node has it."""
    gpus = devices_of(config) if ray.cluster_resources().get("GPU") else 0
    cpus = config.sharing.cpus
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        most_cpus, most_gpus = (int(max(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
        raise ConfigError(
            f"each actor wants {cpus} CPU and {gpus} GPU of one node, and the largest of {len(nodes)} have "
            f"{most_cpus} CPU and {most_gpus} GPU; start a node that has them, or set sharing.cpus "
            "or the engine's parallel sizes lower"
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


def _wait(ray: Any, seats: list[_Seat], progress: JointProgress, needs: dict[str, int]) -> None:
    """Tell how far all are until all have ended, or one has seen all shards and the others are silent."""
    started_s, is_told = time.monotonic(), False
    while True:
        waiting = {seat.answer: seat for seat in seats if seat.outcome is None}
        is_whole = any(seat.outcome and not seat.outcome.code for seat in seats)
        now_s = time.monotonic()
        if not waiting or (is_whole and all(now_s - seat.heard_s > SETTLE_S for seat in waiting.values())):
            progress.tell(is_last=True)
            return
        if not is_told and now_s - started_s > PLACING_S:
            is_told = True
            _tell_of_places(seats, needs)
        with progress.at_work(sum(bool(seat.host) for seat in waiting.values())):
            for answer in ray.wait(list(waiting), num_returns=len(waiting), timeout=POLL_S)[0]:
                _hear(ray, waiting[answer], len(seats))
        progress.tell()


def _hear(ray: Any, seat: _Seat, count: int) -> None:
    """Take what an actor says, and ask again."""
    try:
        seen: Seen = ray.get(seat.answer)
    except ray.exceptions.RayError as error:
        seat.outcome = Outcome(seat.number, EngineError.exit_code, _lost(str(error)))
    else:
        process = f"{seen.host} {seen.replica}"
        if seat.process not in ("", process):
            seat.restarts += 1
            log.warning("replica %d of %d: killed, and started again on %s", seat.number, count, seen.host)
        seat.host, seat.process, seat.heard_s = seen.host, process, time.monotonic()
        seat.outcome = seen.outcome
        if seat.outcome is None:
            seat.answer = seat.actor.watch.remote()
    if seat.outcome is not None:
        if seat.outcome.code:
            log.warning("replica %d of %d: %s", seat.number, count, seat.outcome.told)
        ray.kill(seat.actor)  # what it took is another's


def _tell_of_places(seats: list[_Seat], needs: dict[str, int]) -> None:
    missing = sum(not seat.host for seat in seats)
    if missing:
        log.warning(
            "%d of %d actors have no place yet: each wants %d CPU and %d GPU; the others go on without them",
            *(missing, len(seats), needs["num_cpus"], needs["num_gpus"]),
        )


def _notes(seat: _Seat) -> Iterator[str]:
    """What the report tells of an actor beside its failure."""
    if seat.restarts:
        yield f"replica {seat.number} was killed and started again ({seat.restarts} x)"
    if seat.outcome is None:
        yield f"replica {seat.number} had no place when the others were done"


def _lost(text: str) -> str:
    """Why an actor is no more, in a line."""
    if "failed to import" in text or "No module named 'lightopd" in text:
        return f"its node cannot import lightopd; install lightopd {__version__} on every node"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"Ray gave its actor up: {' '.join(lines)[:300]}"


@contextlib.contextmanager
def _seated(ray: Any) -> Iterator[list[_Seat]]:
    """A list of actors, all of which have ended when the block has; stopped in an orderly way by Ctrl-C."""
    seats: list[_Seat] = []
    try:
        yield seats
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        ended = [seat.actor.stop.remote(int(number)) for seat in seats if seat.host and not seat.outcome]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=GRACE_S)
        raise
    finally:
        for seat in seats:
            ray.kill(seat.actor)
