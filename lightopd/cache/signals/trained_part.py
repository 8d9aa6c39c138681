"""What of a shard is trained where signals have horizons: the tokens that all of them speak of."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns, SignalColumns
from lightopd.cache.signals.horizon import scored_tokens
from lightopd.schemas.configs import Horizon


def trained_part(columns: ShardColumns, horizons: Mapping[str, Horizon]) -> ShardColumns:
    """A shard for training: tokens behind any of the horizons are masked, for all signals alike.

    What was not scored becomes a distribution that is all tail, with log-probability 0, which no loss counts:
    a NaN would survive the mask.

    Args:
        columns: of the shard.
        horizons: of every signal that the objective reads, also of those that `columns` does not hold.
    """
    if not horizons:
        return columns
    is_scored = {name: scored_tokens(horizon, columns.offsets) for name, horizon in horizons.items()}
    return replace(
        columns,
        loss_mask_N=np.logical_and.reduce([columns.loss_mask_N, *is_scored.values()]),
        signals={
            name: _filled(signal, is_scored[name]) if name in is_scored else signal
            for name, signal in columns.signals.items()
        },
    )


def _filled(signal: SignalColumns, is_scored_N: NDArray[np.bool_]) -> SignalColumns:
    tails_N = signal.tail_logprobs_N
    return replace(
        signal,
        logprobs_N=np.where(is_scored_N, signal.logprobs_N, np.float32(0)),
        tail_logprobs_N=None if tails_N is None else np.where(is_scored_N, tails_N, np.float32(0)),
    )
