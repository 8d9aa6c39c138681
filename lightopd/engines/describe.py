"""What can be said of an engine and its model before anything is loaded: record, precision, limits."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from lightopd.errors import InputError
from lightopd.lineage import model_folder, read_json
from lightopd.schemas.configs import EngineConfig, ModelConfig
from lightopd.schemas.manifest import EngineRecord, Precision

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")


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
    """The lineage record of an engine, and the precision it will run the model in."""
    version = importlib.metadata.version("transformers")
    record = EngineRecord(kind=engine.kind, version=version, settings={"attention": model.attention})
    return record, precision_of(model)


def precision_of(model: ModelConfig) -> Precision:
    """Number format and quantisation of a model as it will be run; `auto` is what its config stores."""
    config = _text_config(model)
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    quantization = config.get("quantization_config") or {}
    return Precision(
        dtype=stored if model.dtype == "auto" else model.dtype, quantization=quantization.get("quant_method")
    )


def _text_config(model: ModelConfig) -> dict[str, Any]:
    config = read_json(model_folder(model).path / "config.json")
    return {**config, **(config.get("text_config") or {})}
