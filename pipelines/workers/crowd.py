"""A stage by several processes that one command starts: on this machine, or as actors of a Ray cluster."""

from pathlib import Path

from lightopd.cache.buckets.places import place_of
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.pipelines.workers.ray_actors import run_actors
from lightopd.pipelines.workers.replicas import run_replicas
from lightopd.schemas.configs import PrecomputeConfig, RolloutConfig


def run_crowd(
    stage: str, config: RolloutConfig | PrecomputeConfig, folder: Path, num_shards: int
) -> Report | None:
    """Have a stage's shards made by the replicas that its config asks for; None: this process makes them.

    Args:
        stage: its command.
        config: of the stage.
        folder: where its shards appear.
        num_shards: how many there will be.

    Raises:
        LightopdError: what the first replica that failed said, where all have; or Ray cannot run them.
        KeyboardInterrupt: this process was stopped, or all replicas were; all have ended.
    """
    sharing = config.sharing
    if sharing.execution == "local" and sharing.replicas == 1:
        return None
    run = run_actors if sharing.execution == "ray" else run_replicas
    report = run(stage, config, folder, num_shards)
    place = place_of(config.cache)
    if place is not None:
        place.look()  # else what a replica sent would be taken for newer than what is saved now
    save_report(report, config.cache if stage == "rollout" else folder)
    if place is not None:
        place.send()
    return report
