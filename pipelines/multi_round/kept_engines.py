"""Engines that stay loaded from round to round."""

from typing import Any

from lightopd.engines.base import Engine
from lightopd.pipelines.sampling.sample import LoadEngine
from lightopd.schemas.configs import EngineConfig, ModelConfig


class KeptEngines:
    """A `load` that loads each model once and frees all at the end, for rounds shorter than loading is."""

    def __init__(self, load: LoadEngine) -> None:
        self._load = load
        self._engines: dict[str, Engine] = {}

    def __enter__(self) -> "KeptEngines":
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __call__(self, engine: EngineConfig, model: ModelConfig) -> Engine:
        """The engine of these settings, loaded by the first call; the stage's `close` leaves it open."""
        key = engine.model_dump_json() + model.model_dump_json()
        if key not in self._engines:
            self._engines[key] = self._load(engine, model)
        kept: Engine = _LeftOpen(self._engines[key])
        return kept


class _LeftOpen:
    """An engine whose `close` does nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Leave the model loaded."""
