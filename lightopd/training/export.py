"""The student that a run hands over, made from a checkpoint."""

import shutil
from pathlib import Path

from lightopd.cache.shards import output_error
from lightopd.engines.models import load_model
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.checkpoint import copy_companions, export_student


def export(checkpoint: Path, student: ModelConfig, finetune: FinetuneConfig, folder: Path) -> None:
    """Write the student of a checkpoint to `folder`, replacing what is there, whole or not at all.

    An adapter stays an adapter unless `finetune.adapter.merge` asks for one plain model.

    Raises:
        OutputError: no space or no permission; the checkpoint is untouched.
    """
    if finetune.adapter is None or not finetune.adapter.merge:
        export_student(checkpoint, folder)
        return
    part = folder.with_name(f".{folder.name}.merged")
    adapted = student.model_copy(update={"dtype": "float32", "adapter": checkpoint})
    model = load_model(adapted, "cpu")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        copy_companions(student, part)
        model.save_pretrained(part)
        export_student(part, folder)
    except OSError as error:
        raise output_error(error, folder, 4 * model.num_parameters()) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
