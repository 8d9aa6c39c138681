"""The student that a run hands over, made from a checkpoint."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lightopd.files import output_error, put_folder
from lightopd.lineage.fingerprint import model_folder
from lightopd.models.load import load_model
from lightopd.models.tokenizer import load_tokenizer
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.manifest import STUDENT_LINEAGE
from lightopd.training.checkpoints.checkpoint import STATE_FILE
from lightopd.training.checkpoints.untouched import carry_untouched, stored_names
from lightopd.training.student.adapters import ADAPTER_CONFIG, load_student, save_student
from lightopd.training.student.ema import lay_average, load_average
from lightopd.training.weight_files.consolidate import write_whole
from lightopd.training.weight_files.tensor_shards import AVERAGE, JUMP_ANCHOR, MODEL, OPTIMIZER, is_shared

NOT_EXPORTED = (
    STATE_FILE,
    *(f"{name}{ending}" for name in (OPTIMIZER, AVERAGE, JUMP_ANCHOR) for ending in ("", ".safetensors")),
    MODEL,
)
"""What a checkpoint has beside a model; in shares, sets of tensors are folders."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
NOT_COPIED = ("config.json", STUDENT_LINEAGE, STATE_FILE, "README.md", "provenance.json")
"""Written anew, or about the model that training began with and not about what became of it."""


def export(checkpoint: Path, student: ModelConfig, finetune: FinetuneConfig, folder: Path) -> None:
    """Write the student of a checkpoint to `folder`, replacing what is there, whole or not at all.

    It has every tensor that it came with: what training did not read is carried over from where it began.
    Averaged weights, where the checkpoint has them, go before its own. An adapter stays an adapter unless
    `finetune.adapter.merge` makes one plain model of it. Weights that several processes stored in shares are
    put together with one file in memory at a time.

    Raises:
        OutputError: no space or no permission; the checkpoint is untouched.
    """
    if is_shared(checkpoint):
        how = {
            "trust_remote_code": student.trust_remote_code,
            "stored": stored_names(model_folder(student).path),
        }
        write = partial(write_whole, checkpoint, **how)  # type: ignore[arg-type]
        export_student(checkpoint, folder, write, student)
        return
    parts = [folder.with_name(f".{folder.name}.{made}") for made in ("averaged", "merged")]
    try:
        source = _averaged(checkpoint, student, finetune, parts[0])
        if finetune.adapter is not None and finetune.adapter.merge:
            source = _merged(source, student, parts[1])
        export_student(source, folder, beginning=student)
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


def export_student(
    checkpoint: Path,
    student: Path,
    write_weights: Callable[[Path], None] | None = None,
    beginning: ModelConfig | None = None,
) -> None:
    """Copy a checkpoint's model to `student`, replacing what is there, whole or not at all.

    Args:
        checkpoint: a model's folder, or one with its weights in shares.
        student: the folder to make.
        write_weights: writes the weights into a folder, where those of the checkpoint are stored in shares.
        beginning: where training began, for what it did not read; None where there is nothing of that kind.

    Raises:
        OutputError: no space or no permission; the checkpoint is untouched.
    """
    part = student.with_name(f".{student.name}.tmp")
    try:
        shutil.rmtree(part, ignore_errors=True)
        ignored = shutil.ignore_patterns(*NOT_EXPORTED)
        shutil.copytree(checkpoint, part, ignore=ignored, copy_function=_copy)
        if write_weights is not None:
            write_weights(part)
        if beginning is not None and not (part / ADAPTER_CONFIG).is_file():
            carry_untouched(part, beginning)
        _give_modes(part)
        put_folder(part, student)
    except OSError as error:
        raise output_error(error, student, sum(f.stat().st_size for f in checkpoint.rglob("*"))) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _give_modes(folder: Path) -> None:
    """Give every file the mode of a new one; safetensors makes files that nobody else can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _copy(source: str, target: str) -> str:
    """For `shutil.copytree`, which would gather failures of the disk into a list without their numbers."""
    try:
        return shutil.copy2(source, target)
    except OSError as error:
        raise output_error(error, Path(target), Path(source).stat().st_size) from error


def copy_companions(student: ModelConfig, folder: Path) -> None:
    """Copy what lies beside config and weights: tokenizer, chat template, generation settings, licence."""
    source = model_folder(student)
    for file in sorted(source.path.iterdir()):
        is_hidden = file.name.startswith(".")
        if file.is_file() and not is_hidden and file.name not in NOT_COPIED:
            if not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, folder / file.name)
        elif file.name == "additional_chat_templates":
            shutil.copytree(file, folder / file.name, copy_function=_copy)
    if source.commit is not None:  # transformers knows exceptions by a repository's id, a folder has none
        load_tokenizer(student).save_pretrained(folder)


@contextmanager
def _made_anew(part: Path, size_bytes: int) -> Iterator[None]:
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield
    except OSError as error:
        raise output_error(error, part, size_bytes) from error
