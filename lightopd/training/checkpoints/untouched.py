"""What a student had beside the weights that are trained: other towers, other heads.

transformers reads the language model out of a larger one and leaves the rest: a vision tower, a head that
predicts several tokens. An exported student gets that back, bit by bit, and the larger model's config.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lightopd.errors import InputError
from lightopd.files import json_bytes, write_atomically
from lightopd.lineage.fingerprint import model_folder, read_json, weight_files
from lightopd.models.load import outline
from lightopd.schemas.configs import ModelConfig
from lightopd.training.weight_files.names import unread

TRAINED_FILE, UNTOUCHED_FILE = "model-trained.safetensors", "model-untouched.safetensors"
ONE_FILE_BYTES = 5 << 30
"""Up to this size trained and untouched weights are put into one file, which are then all in memory."""


def stored_names(folder: Path) -> dict[str, Path]:
    """Names of a model folder's tensors, each with the file that has it.

    Raises:
        InputError: the folder has no weights that can be read.
    """
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def check_names(model: PreTrainedModel, student: ModelConfig) -> None:
    """Refuse, before the first step, a student that could not be put back into the larger model it lies in.

    Raises:
        InputError: its tensors would be saved under names that its folder does not have.
    """
    base = model_folder(student).path
    if read_json(base / "config.json").get("model_type") == model.config.model_type:
        return
    shapes = {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()}
    _refuse_strangers(
        revert_weight_conversion(model, shapes).keys() - _tied(model), stored_names(base), student
    )


def carry_untouched(folder: Path, student: ModelConfig) -> None:
    """Add to a folder with trained weights the tensors of the student that training did not read.

    Args:
        folder: a plain model, its names those of the student's files.
        student: where training began; its adapter does not matter.

    Raises:
        OSError: no space or no permission.
        InputError: the student's folder cannot be read, or is another model than this one.
    """
    base = model_folder(student).path
    settings = read_json(base / "config.json")
    before, trained = stored_names(base), stored_names(folder)
    left = [name for name in before if name not in trained]
    if not left or "quantization_config" in settings:  # the scales of weights that are whole numbers now
        return
    left = unread(outline(folder, trust_remote_code=student.trust_remote_code), left)
    if not left:
        return
    own = read_json(folder / "config.json")
    if own.get("model_type") != settings.get("model_type"):
        _refuse_strangers(trained, before, student)
        write_atomically(folder / "config.json", json_bytes(_in_format(settings, own.get("dtype"))))
    _add(folder, trained, _read({name: before[name] for name in left}))


def _tied(model: PreTrainedModel) -> set[str]:
    """Names under which nothing is saved: the tensor lies in the file under another."""
    return {*getattr(model, "all_tied_weights_keys", {})}


def _refuse_strangers(trained: Iterable[str], before: Iterable[str], student: ModelConfig) -> None:
    strangers = sorted({*trained} - {*before})
    if strangers:
        raise InputError(
            f"{student.path} is a language model within a larger one, and {len(strangers)} of its tensors "
            f"would get names that it does not have, first {strangers[0]}; take its language model "
            "alone: load it with transformers' AutoModelForCausalLM and save that with save_pretrained"
        )


def _in_format(settings: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The config of the larger model, with the number format that the trained weights are stored in."""
    changed = {key: value for key, value in settings.items() if key != "torch_dtype"} | {"dtype": dtype}
    text = settings.get("text_config")
    return changed | ({"text_config": _in_format(text, dtype)} if isinstance(text, dict) else {})


def _read(places: dict[str, Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted({*places.values()}):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name, place in places.items() if place == file}
    return tensors


def _add(folder: Path, trained: dict[str, Path], beside: dict[str, Tensor]) -> None:
    single, added = folder / SAFE_WEIGHTS_NAME, folder / UNTOUCHED_FILE
    size_bytes = sum(tensor.nbytes for tensor in beside.values())
    if single.is_file() and single.stat().st_size + size_bytes <= ONE_FILE_BYTES:
        save_file(_read(trained) | beside, added, metadata={"format": "pt"})
        added.replace(single)
        return
    save_file(beside, added, metadata={"format": "pt"})
    _write_index(folder, trained, beside)


def _write_index(folder: Path, trained: Iterable[str], left: Iterable[str]) -> None:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        whole = json.loads(index.read_text(encoding="utf-8"))
    else:
        (folder / SAFE_WEIGHTS_NAME).rename(folder / TRAINED_FILE)
        whole = {"metadata": {}, "weight_map": dict.fromkeys(trained, TRAINED_FILE)}
    whole["weight_map"] |= dict.fromkeys(left, UNTOUCHED_FILE)
    files = {*whole["weight_map"].values()}
    whole["metadata"]["total_size"] = sum((folder / name).stat().st_size for name in files)
    write_atomically(index, json_bytes(whole))
