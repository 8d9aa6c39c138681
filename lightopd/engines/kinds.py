"""The kinds of engine, in one registry: how each is described and loaded, and what its tails are.

An engine's modules, and the libraries they need, are imported only when it is requested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name

from lightopd.engines.base import Engine, Tail
from lightopd.schemas.configs import EngineConfig, ModelConfig
from lightopd.schemas.manifest import EngineRecord, Precision

LoadEngine = Callable[[EngineConfig, ModelConfig], Engine]
"""How a stage gets its engine; `load_engine` unless the caller keeps engines, or tests."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One way to run a model; functions are named as `module:function` and take engine and model configs."""

    describe: str
    """Gives `EngineRecord` and `Precision`, without loading anything."""
    load: str
    """Gives an `Engine`."""
    tail: Tail
    """Whether it sums the mass outside the top-k, or derives it from the mass inside."""


KINDS = {
    "hf": EngineKind(
        "lightopd.engines.hf.engine:describe_hf", "lightopd.engines.hf.engine:load_hf_engine", "exact"
    ),
    "vllm": EngineKind(
        "lightopd.engines.vllm.settings:describe_vllm",
        "lightopd.engines.vllm.in_process:load_vllm_engine",
        "derived",
    ),
    "server": EngineKind(
        "lightopd.engines.vllm.server:describe_server",
        "lightopd.engines.vllm.server:load_server_engine",
        "derived",
    ),
}
"""Every kind that `engine.kind` can name."""


def describe_engine(engine: EngineConfig, model: ModelConfig) -> tuple[EngineRecord, Precision]:
    """The lineage record of an engine, and the precision it will run the model in.

    Raises:
        ConfigError: vLLM is not installed, or the API key is missing.
        EngineError: a server does not answer, or several run different versions.
    """
    described: tuple[EngineRecord, Precision] = resolve_name(KINDS[engine.kind].describe)(engine, model)
    return described


def load_engine(engine: EngineConfig, model: ModelConfig) -> Engine:
    """Load the model into the engine that the config names, or connect to the server that serves it.

    Raises:
        InputError: the model cannot be read.
        ConfigError: the engine's package, device or API key is missing, or a setting does not fit the model.
        EngineError: the model cannot be loaded, or a server does not answer as it must.
    """
    loaded: Engine = resolve_name(KINDS[engine.kind].load)(engine, model)
    return loaded


def tail_of(engine: EngineConfig) -> Tail:
    """Whether an engine sums the mass outside the top-k, or derives it from the mass inside."""
    return KINDS[engine.kind].tail
