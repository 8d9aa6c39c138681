"""What can be said of a model before it is loaded: its sizes and its precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightopd.errors import InputError
from lightopd.lineage.fingerprint import model_folder, read_json
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import Precision

CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)
"""What families call the length of their context."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Sizes that decide what a model can read and answer."""

    vocabulary_size: int
    """Width of the output layer."""
    context_length: int
    """Most tokens in prompt and response together."""
    rope_switch: int | None = None
    """Where the factors of positions change, see `rope_switch_in`; the context ends there."""


def model_limits(model: ModelConfig) -> ModelLimits:
    """Vocabulary and context of a model, from its `config.json`.

    Raises:
        InputError: no such model, or its config names neither.
    """
    config = _text_config(model)
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or not 0 < vocabulary < 2**31:
        raise InputError(f"{model.path}/config.json names no vocab_size; add it")
    length = context_length_in(config, f"{model.path}/config.json")
    return ModelLimits(vocabulary, length, rope_switch_in(config))


def context_length_in(config: Mapping[str, Any], name: str) -> int:
    """Most tokens in prompt and response together, out of a model's text config.

    Raises:
        InputError: it does not say; `name` says whose config it is.
    """
    lengths = (config.get(key) for key in CONTEXT_KEYS)
    found = next((length for length in lengths if isinstance(length, int) and 0 < length < 2**31), None)
    if found is not None:
        return min(found, rope_switch_in(config) or found)
    raise InputError(f"{name} names no context length; add max_position_embeddings")


def rope_switch_in(config: Mapping[str, Any]) -> int | None:
    """The length at which a model changes the factors of its positions (longrope); None where it never does.

    Beyond it every position of a sequence is rotated by other factors, those before the switch too. So a
    response's earlier log-probabilities would depend on how long it becomes, and on what stands beside it in
    a batch. The context ends there. A model whose short and long factors are equal has no switch.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scalings = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    switches = [
        scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        for scaling in scalings
        if isinstance(scaling, Mapping) and scaling.get("short_factor") != scaling.get("long_factor")
    ]
    return min((switch for switch in switches if isinstance(switch, int)), default=None)


def precision_of(model: ModelConfig) -> Precision:
    """Number format and quantisation of a model as it will be run; `auto` is what its config stores.

    Raises:
        InputError: its config names something else than a format.
    """
    config = _text_config(model)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(stored, str) or not isinstance(method, str | None):
        raise InputError(
            f"{model.path}/config.json has dtype {str(stored)[:40]!r} and quantization_config with method "
            f"{str(method)[:40]!r}; both are names"
        )
    return Precision(dtype=stored if model.dtype == "auto" else model.dtype, quantization=method)


def _text_config(model: ModelConfig) -> dict[str, Any]:
    folder = model_folder(model).path
    config = read_json(folder / "config.json")
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise InputError(f"{folder}/config.json: text_config is no mapping; copy or download it again")
    text = {**config, **text}
    if "vocab_size" in text and any(key in text for key in CONTEXT_KEYS):
        return text
    # Some files, Gemma 3's among them, name only what differs from the defaults of their class.
    return {**_class_defaults(folder, model.trust_remote_code), **text}


def _class_defaults(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception:  # noqa: BLE001 - a damaged file fails in ways of its own; what is missing is named later
        return {}
    defaults: dict[str, Any] = config.get_text_config(decoder=True).to_dict()
    return defaults
