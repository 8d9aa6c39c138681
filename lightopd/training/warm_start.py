"""A run that starts with the optimiser of a finished run, as one round of several does.

The weights are the student's own; what is carried is the optimiser's moments and the objective's state.
"""

from pathlib import Path

from lightopd.errors import TrainingError
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.lineage.tensor_hashes import hash_tensors
from lightopd.objectives.state import restored
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import ModelConfig
from lightopd.training.checkpoints.checkpoint import (
    TrainerState,
    exported_checkpoint,
)
from lightopd.training.module import Start
from lightopd.training.student.adapters import ADAPTER_CONFIG, trained_student
from lightopd.training.weight_files.tensor_shards import AVERAGE, OPTIMIZER, StoredSet, has_set


def optimizer_state_hash(run: Path, student: ModelConfig) -> str:
    """Hash of the optimiser state that a finished run left, for the recipe of the run that starts with it.

    It is the same however many processes wrote the state.

    Args:
        run: `out` folder of the finished run.
        student: of the new run; it must be the student that the finished run made.

    Raises:
        TrainingError: the run is not finished, its student's checkpoint is gone, or it made another student,
            exported averaged weights, or merged its adapter.
    """
    checkpoint, _ = _exported(run)
    if has_set(checkpoint, AVERAGE):
        raise TrainingError(
            f"continue_from is {run}, whose student has averaged weights, and its optimiser other ones; "
            "leave ema_decay out there, or leave continue_from out for a fresh optimiser"
        )
    if (checkpoint / ADAPTER_CONFIG).is_file() and not (run / "student" / ADAPTER_CONFIG).is_file():
        raise TrainingError(
            f"continue_from is {run}, whose optimiser is that of an adapter, and the adapter was merged; set "
            "adapter.merge to false there, or leave continue_from out for a fresh optimiser"
        )
    made = fingerprint_model(trained_student(student, run / "student"))
    if made.identity != fingerprint_model(student).identity:
        raise TrainingError(
            f"continue_from is {run}, which made another student than {student.path}; "
            f"train {run / 'student'}, or leave continue_from out"
        )
    if (checkpoint / OPTIMIZER).is_dir():
        tensors = StoredSet(checkpoint, OPTIMIZER).hashes()
    else:
        tensors = hash_tensors([checkpoint / f"{OPTIMIZER}.safetensors"])
    return canonical_hash([list(tensor) for tensor in tensors])


def start_after(run: Path | None) -> Start:
    """Step 0 with the optimiser and objective state of a finished run; plain step 0 without one."""
    if run is None:
        return Start()
    checkpoint, state = _exported(run)
    return Start(0, checkpoint, restored(state.objective))


def _exported(run: Path) -> tuple[Path, TrainerState]:
    found = exported_checkpoint(run / "checkpoints")
    if found is None:
        raise TrainingError(
            f"continue_from is {run}, which is unfinished or lacks its student's checkpoint; give that run's "
            "command again, or leave continue_from out for a fresh optimiser"
        )
    return found
