"""A signal's horizon: how far into each response it goes.

R = rollouts, N = their response tokens laid end to end. A signal with a horizon stores the first tokens of
each response alone, at least one. Readers give its columns the length of the responses, with NaN where
nothing was scored.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.store import Cache
from lightopd.schemas.configs import Horizon

ROUNDING = 1e-9
"""Tokens by which share * length may lie above a whole number, so that 0.3 of 10 is 3."""


def scored_lengths(horizon: Horizon | None, lengths_R: NDArray[np.integer]) -> NDArray[np.int64]:
    """Tokens of each response that a signal speaks of, from its first: min(h, R), for a share ceil(h * R)."""
    lengths: NDArray[np.int64] = np.asarray(lengths_R, np.int64)
    if horizon is None:
        return lengths
    if isinstance(horizon, int):
        return np.minimum(lengths, np.int64(horizon))
    share: NDArray[np.int64] = np.ceil(horizon * lengths - ROUNDING).astype(np.int64)
    return share


def scored_length(horizon: Horizon | None, length: int) -> int:
    """The same of one response."""
    return int(scored_lengths(horizon, np.array([length]))[0])


def scored_offsets(horizon: Horizon | None, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets of the columns on disk, [R + 1], from those of the responses."""
    if horizon is None:
        return offsets
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(scored_lengths(horizon, np.diff(offsets)))])


def scored_tokens(horizon: Horizon | None, offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True at the response tokens that a signal speaks of, [N]; `offsets` cut the responses."""
    lengths_R = np.diff(offsets)
    place_N = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths_R)
    return np.asarray(place_N < np.repeat(scored_lengths(horizon, lengths_R), lengths_R))


def spread(values: NDArray[Any], is_scored_N: NDArray[np.bool_], filler: float) -> NDArray[Any]:
    """A column on disk at the length of the responses, with a filler where nothing was scored."""
    spread_N = np.full(len(is_scored_N), filler, values.dtype)
    spread_N[is_scored_N] = values
    return spread_N


def horizons_of(cache: Cache, signals: Iterable[str]) -> dict[str, Horizon]:
    """By name, of those signals that have one."""
    found = {name: cache.signals[name].manifest.horizon for name in signals if name in cache.signals}
    return {name: horizon for name, horizon in found.items() if horizon is not None}


def in_words(horizon: Horizon) -> str:
    """As a sentence has it: `first 512 tokens`, `first 30 %`."""
    return f"first {horizon} tokens" if isinstance(horizon, int) else f"first {100 * horizon:g} %"


def horizon_notes(cache: Cache, signals: Iterable[str]) -> list[str]:
    """What of the responses the signals speak of and training uses, for a report; nothing where it is all."""
    there = horizons_of(cache, signals)
    scored = {name: sum(marker.tokens for marker in cache.signals[name].markers) for name in there}
    lines = [
        f"signal {name} holds the {in_words(horizon)} of each response, {scored[name]:,} of "
        f"{cache.num_tokens:,} response tokens; the rest is masked in training"
        for name, horizon in there.items()
    ]
    if len({str(horizon) for horizon in there.values()}) > 1:
        lines.append(f"of {' and '.join(there)} the part that all of them hold is trained")
    return lines
