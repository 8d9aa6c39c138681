"""How much an engine disagrees with itself: the floor that every later comparison is judged against."""

from collections.abc import Sequence

import numpy as np

from lightopd.engines.base import Engine
from lightopd.errors import EngineError
from lightopd.schemas import records
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.manifest import NoiseFloor

SAMPLE = 8
"""Sequences that are scored twice."""


def measure_noise(engine: Engine, sequences: Sequence[records.Sequence]) -> NoiseFloor:
    """Score the first few sequences alone and then in one batch, and compare, nats.

    Only sampled-token log-probabilities are compared; `tokens` is 0 when no sequence has a response.
    """
    chosen = [sequence for sequence in sequences if len(sequence.response_ids)][:SAMPLE]
    alone = [engine.score([sequence], 0)[0].logprobs for sequence in chosen]
    together = [scores.logprobs for scores in engine.score(chosen, 0)] if chosen else []
    return compare(alone, together)


def refuse_noise(found: NoiseFloor, limit_nats: float, between: str) -> None:
    """Refuse a teacher whose scores are not settled well enough to distil.

    Raises:
        EngineError: the mean difference is above the limit; names both.
    """
    if found.mean_nats > limit_nats:
        raise EngineError(
            f"{between} lie {found.mean_nats:.3g} nats apart on average, {found.max_nats:.3g} at most; the "
            f"limit is max_noise_nats {limit_nats:g}: run the teacher in a wider number format, or raise it"
        )


def reference_logprobs(model: ModelConfig, sequences: Sequence[records.Sequence]) -> list[records.Floats]:
    """Log-probabilities of the sequences by transformers in float32; its memory is free again afterwards."""
    if not sequences:
        return []
    from lightopd.engines.hf.engine import load_hf_engine

    engine = load_hf_engine(HfEngine(), model.model_copy(update={"dtype": "float32"}))
    try:
        return [scores.logprobs for scores in engine.score(sequences, 0)]
    finally:
        engine.close()


def compare(first: Sequence[records.Floats], second: Sequence[records.Floats]) -> NoiseFloor:
    """Absolute differences of two scorings of the same tokens, nats."""
    differences = [np.abs(a.astype(np.float64) - b) for a, b in zip(first, second, strict=True)]
    flat = np.concatenate(differences) if differences else np.zeros(0)
    if not len(flat):
        return NoiseFloor(mean_nats=0.0, max_nats=0.0, tokens=0)
    return NoiseFloor(mean_nats=float(flat.mean()), max_nats=float(flat.max()), tokens=len(flat))
