"""Low-rank adapters: LoRA and DoRA on a frozen student, by way of peft.

The wrapped model answers to the same calls as a plain one, so that a step does not know the difference. The
output layer is left as it is: the loss is made from that layer's own weight, where no adapter would be seen.
"""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.errors import ConfigError, InputError
from lightopd.models.load import check_adapter_config, load_model
from lightopd.schemas.configs import ADAPTER_CONFIG as ADAPTER_CONFIG
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import ALL_LINEAR, AdapterConfig, FinetuneConfig
from lightopd.training.weight_files.tensor_shards import is_shared, whole_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_student(student: ModelConfig, finetune: FinetuneConfig, checkpoint: Path | None) -> Any:
    """The model that is trained, on the CPU in float32: as it begins, or as a checkpoint left it.

    With an adapter it is a `PeftModel` whose base is frozen. An adapter that the student brings is trained;
    without `finetune.adapter` it is merged and every weight trained.

    Raises:
        ConfigError: peft is missing, the adapter would change the output layer, names no module, or is of
            another shape than the one the student brings.
        InputError: a folder cannot be read.
    """
    changes: dict[str, Any] = {"dtype": "float32"}
    if finetune.adapter is None:
        if checkpoint is not None:
            changes |= {"path": str(checkpoint), "revision": None, "adapter": None}
        # peft freezes the model that it merges an adapter into.
        tensors = whole_weights(checkpoint) if checkpoint is not None and is_shared(checkpoint) else None
        return load_model(student.model_copy(update=changes), "cpu", tensors).requires_grad_(True)
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("adapter needs peft, which is not installed: pip install 'lightopd[adapters]'")
    base = load_model(student.model_copy(update={**changes, "adapter": None}), "cpu")
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    is_tied = head.weight is embeddings.weight
    source = checkpoint or student.adapter
    model = _new(base, finetune.adapter, finetune.seed) if source is None else _stored(base, source)
    if model.get_output_embeddings() is not head or (
        is_tied and model.get_input_embeddings() is not embeddings
    ):
        raise ConfigError(
            "the adapter changes the output layer, or the embedding that is tied to it, and must not; "
            f"leave it out of adapter.target_modules (now {finetune.adapter.target_modules})"
        )
    if checkpoint is None and student.adapter is not None:
        _check_same_shape(student.adapter, model, finetune.adapter)
    return model


def save_student(model: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the model's weights and config into a folder; of an adapted model, the adapter's alone.

    `weights` stand for the model's own where those are sharded over devices.
    """
    if not is_adapted(model):
        model.save_pretrained(folder, state_dict=weights)
        return
    from peft import get_peft_model_state_dict  # type: ignore[import-not-found,unused-ignore]

    tensors = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    base = config.base_model_name_or_path
    if base is not None:
        config.base_model_name_or_path = lasting_name(base, is_folder=Path(base).is_dir())
    if not isinstance(config.target_modules, str):  # peft keeps a set, whose order changes from run to run
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def lasting_name(base: str, *, is_folder: bool) -> str:
    """A model's name that holds from every working folder: its hub id, or its absolute path."""
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", base)
    if found or not is_folder:
        return "/".join(found.groups()) if found else base
    return str(Path(base).resolve())


def is_adapted(model: Any) -> bool:
    """Whether only an adapter is trained."""
    return hasattr(model, "peft_config")


def trained_student(student: ModelConfig, folder: Path) -> ModelConfig:
    """The student that training left in `folder`: a plain model, or an adapter on the one before."""
    if (folder / ADAPTER_CONFIG).is_file():
        return student.model_copy(update={"adapter": folder})
    return student.model_copy(update={"path": str(folder), "revision": None, "adapter": None})


def _new(base: PreTrainedModel, adapter: AdapterConfig, seed: int) -> Any:
    """A fresh adapter, drawn from the run's seed; it changes nothing before the first step."""
    from peft import LoraConfig, get_peft_model

    names = adapter.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_dora=adapter.kind == "dora",
        target_modules=names if names == ALL_LINEAR else list(names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(base, config)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"adapter.target_modules {names} does not fit the student ({reason})"
            ) from error


def _stored(base: PreTrainedModel, folder: Path) -> Any:
    from peft import PeftModel

    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"adapter folder {folder} has no {ADAPTER_CONFIG}; check the path")
    check_adapter_config(folder)
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"adapter folder {folder} does not fit the model ({error})") from error


def _check_same_shape(folder: Path, model: Any, requested: AdapterConfig) -> None:
    found = model.peft_config["default"]
    pairs: dict[str, tuple[Any, Any]] = {
        "kind": (
            requested.kind,
            "dora" if getattr(found, "use_dora", False) else found.peft_type.value.lower(),
        ),
        "rank": (requested.rank, getattr(found, "r", None)),
        "alpha": (requested.alpha, getattr(found, "lora_alpha", None)),
    }
    if requested.target_modules != ALL_LINEAR:
        pairs["target_modules"] = (sorted(requested.target_modules), sorted(found.target_modules))
    differences = [f"{name} is {a}, there {b}" for name, (a, b) in pairs.items() if a != b]
    if differences:
        raise ConfigError(
            f"the student's adapter {folder} is of another shape than the setting adapter: "
            f"{'; '.join(differences)}; set these to the adapter's, or merge it into its base first"
        )
