"""Top-k log-probabilities at the values that a signal's `topk_dtype` has, and how far off those are.

They stay float32 in the file, which every reader knows: bytes that repeat compress away.
"""

import numpy as np
from numpy.typing import NDArray

from lightopd.schemas.signals.precision import STEP_NATS

HALF_ROUNDING = 2.0**-11
"""Relative rounding error of float16: a log-probability l is stored within |l| * 2^-11."""


def rounded(logprobs: NDArray[np.float32], topk_dtype: str) -> NDArray[np.float32]:
    """The nearest values that are stored; infinite where float16 has none."""
    if topk_dtype == "float16":
        with np.errstate(over="ignore"):
            return logprobs.astype(np.float16).astype(np.float32)
    if topk_dtype in STEP_NATS:
        step_nats = np.float32(STEP_NATS[topk_dtype])
        return np.round(logprobs / step_nats) * step_nats + np.float32(0)  # no -0
    return logprobs


def rounded_tails(tails: NDArray[np.float32], topk_dtype: str) -> NDArray[np.float32]:
    """The tails that are stored: steps are for them as well, float16 is not; -inf stays."""
    return rounded(tails, topk_dtype) if topk_dtype in STEP_NATS else tails


def largest_error(logprobs: NDArray[np.float64], topk_dtype: str) -> NDArray[np.float64]:
    """How far the stored value of each log-probability may lie from it, nats."""
    if topk_dtype == "float16":
        return HALF_ROUNDING * np.abs(logprobs)
    return np.full(np.shape(logprobs), STEP_NATS.get(topk_dtype, 0.0) / 2)


def largest_tail_error(topk_dtype: str) -> float:
    """How far a stored tail may lie from the true one, nats."""
    return STEP_NATS.get(topk_dtype, 0.0) / 2
