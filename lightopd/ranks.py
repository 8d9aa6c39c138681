"""Who is rank 0: what the environment of a process says of its place in a run."""

import os

WORKER = "LIGHTOPD_WORKER"
"""Set in a worker: the pipe it reports to, and the one that closes when the process that started it ends."""
RANKS = ("RANK", "LOCAL_RANK")


def is_worker() -> bool:
    """Whether `start_workers` started this process."""
    return WORKER in os.environ


def rank_here() -> int | None:
    """Rank of this process over all nodes, from the environment; None where nobody gave it one."""
    rank = next((os.environ[name] for name in RANKS if name in os.environ), None)
    if rank is None and _in_slurm():
        rank = os.environ.get("SLURM_PROCID")
    return None if rank is None else int(rank)


def is_first_rank() -> bool:
    """Whether this process has rank 0 over all nodes; Lightning's own answer is of the time of its import."""
    return rank_here() in (None, 0)


def is_main() -> bool:
    """Whether this is the one process of the run that holds its folder and says how it went."""
    first_node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")) == "0"
    return not is_worker() and is_first_rank() and first_node


def _in_slurm() -> bool:
    # As Lightning decides it: a shell within a job is not a task of it.
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not is_shell
