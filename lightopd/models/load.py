"""Loads a causal language model with transformers."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from lightopd.errors import ConfigError, InputError, LightopdError
from lightopd.lineage.fingerprint import model_folder, read_json
from lightopd.models.attention import attention_of, read_config
from lightopd.models.head import Head
from lightopd.models.limits import context_length_in
from lightopd.schemas.configs import ModelConfig

log = logging.getLogger(__name__)

PROBE_TOKENS = 8
"""Tokens on which a model is compared before and after an adapter is merged."""
FULL_NATS, HALF_NATS = 1e-3, 0.2
"""Mean difference that rounding of the merged weights explains, in float32 and in half precision."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model and what an engine has to know about it."""

    model: PreTrainedModel
    head: Head
    device: torch.device
    context_length: int
    """Most tokens in prompt and response together."""


def choose_device(name: str) -> torch.device:
    """The torch device a config names; `auto` is CUDA where there is one.

    Raises:
        ConfigError: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}); set device to auto or cpu"
        ) from error
    return device


def load_model(
    model: ModelConfig, device: torch.device | str, tensors: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Load a model for inference: evaluation mode, adapter merged, on the device.

    Weights are read from safetensors only, so that loading runs no code of theirs. `tensors` stand for those
    in the folder, by the names of the model's state.

    Raises:
        InputError: no such folder, no safetensors weights, weights missing or of other shapes.
        ConfigError: an adapter is asked for and peft is not installed.
    """
    settle_arithmetic()
    with _quiet_transformers():
        loaded = _read_model(model, tensors)
        if model.adapter is not None:
            loaded = _merge_adapter(loaded, model.adapter)
    return loaded.eval().to(device)


def settle_arithmetic() -> None:
    """How this process computes, whatever was set before: the one place that says it.

    Products of float32 factors are made in float32: TF32 has 11 bits, and differences to cached
    log-probabilities would be its rounding. Products in half precision are as PyTorch has them, which adds
    in float32; what has to keep more digits (logits) asks for its result in float32.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # A sure prediction leaves probabilities below 1e-38; many CPUs are far slower on such denormal numbers;
    # as zero they change nothing. Threads inherit the setting, so it precedes the first parallel work.
    torch.set_flush_denormal(True)


def context_length_of(model: PreTrainedModel) -> int:
    """Most tokens the model takes, from its config.

    Raises:
        InputError: the config does not say.
    """
    config = model.config.get_text_config(decoder=True)
    return context_length_in(config.to_dict(), f"the config of {type(model).__name__}")


def outline(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder without its weights (on torch's `meta` device)."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    assert isinstance(made, PreTrainedModel)
    return made


def _read_model(model: ModelConfig, tensors: Mapping[str, Tensor] | None) -> PreTrainedModel:
    folder = model_folder(model).path
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json; check the path")
    if tensors is None and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} has no .safetensors file; save the model with save_pretrained, since other formats "
            f"can run code when they are loaded"
        )
    attention = attention_of(model)
    try:
        how: dict[str, Any] = {
            "dtype": model.dtype if model.dtype == "auto" else getattr(torch, model.dtype),
            "attn_implementation": attention,
            "output_loading_info": True,
        }
        loaded, info = (
            AutoModelForCausalLM.from_pretrained(
                folder,
                trust_remote_code=model.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                **how,
            )
            if tensors is None
            else _from_tensors(folder, tensors, how, trust_remote_code=model.trust_remote_code)
        )
    except LightopdError:
        raise
    except Exception as error:  # a family's own code, on values that its config let pass, fails in any way
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the model in {folder} cannot be loaded ({type(error).__name__}: {reason}); copy it again from "
            "where it was made, or name another model"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"the weights in {folder} lack {len(missing)} tensors that its config.json asks for, first "
            f"{missing[0]}; the folder is incomplete or its config.json belongs to another model"
        )
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _from_tensors(
    folder: Path, tensors: Mapping[str, Tensor], how: Mapping[str, Any], *, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model whose weights are these tensors, and what transformers says of the loading."""
    empty = outline(folder, trust_remote_code=trust_remote_code)
    loaded, info = type(empty).from_pretrained(None, config=empty.config, state_dict=dict(tensors), **how)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded, info


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(f"adapter folder {adapter} has no adapter_config.json; check the path")
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"adapter {adapter} needs peft, which is not installed: pip install 'lightopd[adapters]'"
        )
    from peft import PeftModel  # type: ignore[import-not-found,unused-ignore]

    check_adapter_config(adapter)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
        probe_BT = torch.arange(1, PROBE_TOKENS + 1).remainder(model.get_output_embeddings().weight.shape[0])[
            None
        ]
        with torch.no_grad():
            before_TV = adapted(input_ids=probe_BT, use_cache=False).logits[0].float().log_softmax(-1)
            merged = adapted.merge_and_unload()
            after_TV = merged(input_ids=probe_BT, use_cache=False).logits[0].float().log_softmax(-1)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"adapter folder {adapter} does not fit the model ({reason})") from error
    moved = float((before_TV.exp() * (after_TV - before_TV).abs()).sum(-1).mean())
    if not moved <= (FULL_NATS if model.dtype == torch.float32 else HALF_NATS):
        raise InputError(
            f"merging adapter {adapter} changes the model by {moved:.3g} nats a token: it changes one of two "
            f"layers that share their weights (an output layer tied to the embedding); save the model with "
            f"tie_word_embeddings false and both weights, or leave the layer out of target_modules"
        )
    assert isinstance(merged, PreTrainedModel)
    return merged


def check_adapter_config(adapter: Path) -> None:
    """Refuse an adapter that is more than low-rank weights.

    Raises:
        InputError: it brings whole layers of its own; names them.
    """
    whole = read_json(adapter / "adapter_config.json").get("modules_to_save")
    if whole:
        raise InputError(
            f"adapter folder {adapter} has modules_to_save {whole}: whole layers that replace the model's, "
            f"which lightopd does not merge; merge it with peft into a folder of its own and give that"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers while a model loads; what matters is raised as an error."""
    verbosity = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if had_bars:
            transformers.logging.enable_progress_bar()
