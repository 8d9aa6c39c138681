"""The kinds of engine, in one registry: how each is described and loaded, and what its tails are.

Each engine's libraries are imported only when it is requested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightopd.engines.base import Engine, Tail
from lightopd.models.limits import precision_of
from lightopd.schemas.configs import EngineConfig, HfEngine, ModelConfig, ServerEngine, VllmEngine
from lightopd.schemas.manifest import EngineRecord, Precision


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One way to run a model."""

    describe: Callable[[Any, ModelConfig], tuple[EngineRecord, Precision]]
    load: Callable[[Any, ModelConfig], Engine]
    tail: Tail
    """Whether it sums the mass outside the top-k, or derives it from the mass inside."""


def _describe_hf(engine: HfEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    from lightopd.engines.hf.record import describe_hf

    return describe_hf(engine, model)


def _load_hf(engine: HfEngine, model: ModelConfig) -> Engine:
    from lightopd.engines.hf.engine import load_hf_engine

    return load_hf_engine(engine, model)


def _describe_vllm(engine: VllmEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    from lightopd.engines.vllm.settings import describe_vllm

    return describe_vllm(engine, model)


def _load_vllm(engine: VllmEngine, model: ModelConfig) -> Engine:
    from lightopd.engines.vllm.in_process import load_vllm_engine

    return load_vllm_engine(engine, model)


def _describe_server(engine: ServerEngine, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    from lightopd.engines.vllm.server import describe_server

    return describe_server(engine), precision_of(model)


def _load_server(engine: ServerEngine, model: ModelConfig) -> Engine:
    from lightopd.engines.vllm.server import load_server_engine

    return load_server_engine(engine, model)


KINDS: dict[str, EngineKind] = {
    "hf": EngineKind(_describe_hf, _load_hf, "exact"),
    "vllm": EngineKind(_describe_vllm, _load_vllm, "derived"),
    "server": EngineKind(_describe_server, _load_server, "derived"),
}
"""Every kind that `engine.kind` can name."""


def describe_engine(engine: EngineConfig, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of an engine, and the precision it will run the model in.

    A server is asked for its version; the precision it runs in cannot be asked for, and is the model's own.

    Raises:
        ConfigError: vLLM is not installed, or the API key is missing.
        EngineError: a server does not answer, or several run different versions.
    """
    return KINDS[engine.kind].describe(engine, model)


def load_engine(engine: EngineConfig, model: ModelConfig) -> Engine:
    """Load the model into the engine that the config names, or connect to the server that serves it.

    Raises:
        InputError: the model cannot be read.
        ConfigError: the engine's package, device or API key is missing, or a setting does not fit the model.
        EngineError: the model cannot be loaded, or a server does not answer as it must.
    """
    return KINDS[engine.kind].load(engine, model)


def tail_of(engine: EngineConfig) -> Tail:
    """Whether an engine sums the mass outside the top-k, or derives it from the mass inside."""
    return KINDS[engine.kind].tail
