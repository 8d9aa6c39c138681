"""Builds the engine a config names; each engine's libraries are imported only when it is asked for."""

from lightopd.engines.base import Engine
from lightopd.schemas.configs import EngineConfig, ModelConfig


def load_engine(engine: EngineConfig, model: ModelConfig) -> Engine:
    """Load the model into the engine that the config names.

    Raises:
        InputError: the model cannot be read.
        ConfigError: the engine's package or device is missing.
    """
    from lightopd.engines.hf import load_hf_engine

    return load_hf_engine(engine, model)
