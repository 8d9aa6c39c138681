"""The student that a run hands over, made from a checkpoint."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lightopd.files import output_error
from lightopd.models.load import load_model
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.checkpoints.checkpoint import copy_companions, export_student
from lightopd.training.student.adapters import load_student, save_student
from lightopd.training.student.ema import lay_average, load_average
from lightopd.training.weight_files.consolidate import write_whole
from lightopd.training.weight_files.tensor_shards import is_shared


def export(checkpoint: Path, student: ModelConfig, finetune: FinetuneConfig, folder: Path) -> None:
    """Write the student of a checkpoint to `folder`, replacing what is there, whole or not at all.

    Averaged weights, where the checkpoint has them, go before its own. An adapter stays an adapter unless
    `finetune.adapter.merge` makes one plain model of it. Weights that several processes stored in shares are
    put together with one decoder layer in memory at a time.

    Raises:
        OutputError: no space or no permission; the checkpoint is untouched.
    """
    if is_shared(checkpoint):
        trusts = student.trust_remote_code
        export_student(checkpoint, folder, partial(write_whole, checkpoint, trust_remote_code=trusts))
        return
    parts = [folder.with_name(f".{folder.name}.{made}") for made in ("averaged", "merged")]
    try:
        source = _averaged(checkpoint, student, finetune, parts[0])
        if finetune.adapter is not None and finetune.adapter.merge:
            source = _merged(source, student, parts[1])
        export_student(source, folder)
    finally:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)


def _averaged(checkpoint: Path, student: ModelConfig, finetune: FinetuneConfig, part: Path) -> Path:
    """A folder with the averaged weights of a checkpoint; the checkpoint itself where it has none."""
    average = load_average(checkpoint)
    if not average:
        return checkpoint
    model = load_student(student, finetune, checkpoint)
    lay_average(model, average)
    with _made_anew(part, 4 * model.num_parameters()):
        copy_companions(student, part)
        save_student(model, part)
    return part


def _merged(adapter: Path, student: ModelConfig, part: Path) -> Path:
    """A folder with one plain model of the student's base and an adapter."""
    model = load_model(student.model_copy(update={"dtype": "float32", "adapter": adapter}), "cpu")
    with _made_anew(part, 4 * model.num_parameters()):
        copy_companions(student, part)
        model.save_pretrained(part)
    return part


@contextmanager
def _made_anew(part: Path, size_bytes: int) -> Iterator[None]:
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield
    except OSError as error:
        raise output_error(error, part, size_bytes) from error
