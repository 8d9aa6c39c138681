"""Builds the engine a config names; each engine's libraries are imported only when it is asked for."""

from lightopd.engines.base import Engine
from lightopd.schemas.configs import EngineConfig, HfEngine, ModelConfig, VllmEngine


def load_engine(engine: EngineConfig, model: ModelConfig) -> Engine:
    """Load the model into the engine that the config names, or connect to the server that serves it.

    Raises:
        InputError: the model cannot be read.
        ConfigError: the engine's package, device or API key is missing, or a setting does not fit the model.
        EngineError: the model cannot be loaded, or a server does not answer as it must.
    """
    if isinstance(engine, HfEngine):
        from lightopd.engines.hf import load_hf_engine

        return load_hf_engine(engine, model)
    if isinstance(engine, VllmEngine):
        from lightopd.engines.vllm import load_vllm_engine

        return load_vllm_engine(engine, model)
    from lightopd.engines.server import load_server_engine

    return load_server_engine(engine, model)
