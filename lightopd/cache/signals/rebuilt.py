"""Are stored hidden states those of the log-probabilities beside them? What a head rebuilds says so.

N = tokens that are looked at, D = hidden size, V = vocabulary; nats throughout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightopd.cache.manifests import signal_folder
from lightopd.cache.row_checks import Fault
from lightopd.cache.signals.channels import Channels, HiddenColumns, hidden_columns, read_channels
from lightopd.cache.signals.hidden import hidden_states, read_head
from lightopd.cache.tables import flat_column
from lightopd.errors import EngineError
from lightopd.models.head import Head
from lightopd.schemas.manifest import SignalManifest
from lightopd.schemas.signals.kinds import HiddenStates

LOOKED_AT = 256
"""Tokens of a shard that are rebuilt, evenly spaced: the whole vocabulary of each is summed."""
CHUNK = 32
"""Tokens whose logits are held together."""
DEVIATIONS = 8.0
"""How far a rebuilt log-probability may lie off, in standard deviations of what rounding does to it."""
FLOAT_NATS = 5e-3
"""Beside that: two devices sum a head's products in another order and number format."""
LARGEST_SCALE = 8.0
"""Of the median scale: a larger one that came about by damage would else explain what it does."""
BFLOAT16_ROUNDING = 2.0**-8
"""Largest relative error of a value rounded to bfloat16."""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Rebuilder:
    """A signal's head and statistics, and the check that is made with them."""

    head: Head
    """float32, on the CPU."""
    described: HiddenStates
    channels: Channels | None

    def refuse(self, table: pa.Table, rollouts: pa.Table, shard: int) -> None:
        """Refuse scores whose hidden states do not give their log-probabilities, before they are written.

        Raises:
            EngineError: names the row.
        """
        for fault in self.faults(table, rollouts, largest=math.inf):
            raise EngineError(
                f"shard {shard} row {fault.row}: {fault.what}; the output layer is not read as it is run: "
                "keep a top-k, and report the model's type"
            )

    @torch.inference_mode()
    def faults(self, table: pa.Table, rollouts: pa.Table, largest: float = LARGEST_SCALE) -> Iterator[Fault]:
        """Sampled tokens whose stored log-probability is not the rebuilt one, at most one fault.

        Args:
            table: a signal's rows, whose hidden states have the lengths they must have.
            rollouts: the same rows, with `response_ids`.
            largest: a token's scale allows for the rounding of so many times the median one, at most.
        """
        ids_N, offsets = flat_column(rollouts.column("response_ids"))
        if not len(ids_N):
            return
        columns = hidden_columns(table, self.described, self.channels)
        stored_N = flat_column(table.column("logprobs"))[0]
        usual = None if columns.scales_N is None else largest * float(np.median(columns.scales_N))
        chosen = np.unique(np.linspace(0, len(ids_N) - 1, LOOKED_AT).astype(np.int64))
        apart_N, allowed_N = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    self._apart(_rows(columns, part), ids_N[part], stored_N[part], usual)
                    for part in np.split(chosen, range(CHUNK, len(chosen), CHUNK))
                ),
                strict=True,
            )
        )
        is_off_N = ~(apart_N <= allowed_N)
        if is_off_N.any():
            first = int(is_off_N.argmax())
            row = int(np.searchsorted(offsets, chosen[first], side="right")) - 1
            what = (
                f"at position {chosen[first] - offsets[row]} the hidden state gives the sampled token "
                f"another log-probability than is stored: {apart_N[first]:.3g} nats apart, rounding allows "
                f"{allowed_N[first]:.3g}"
            )
            yield Fault("rebuilt", row, what, int(is_off_N.sum()))

    def _apart(
        self,
        columns: HiddenColumns,
        ids_N: NDArray[np.int32],
        stored_N: NDArray[np.float32],
        usual: float | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Distance of rebuilt and stored log-probabilities, and what rounding explains, float64 [N]."""
        hidden_ND = hidden_states(columns, CPU)
        asked_N = torch.from_numpy(ids_N.astype(np.int64))
        logprobs_NV = self.head.logits(hidden_ND).log_softmax(1)
        rebuilt_N = logprobs_NV.gather(1, asked_N[:, None])[:, 0]
        slopes_ND = self._slopes(hidden_ND, logprobs_NV.exp_(), asked_N)
        spread_N = (slopes_ND * self._rounding(columns, hidden_ND, usual)).norm(dim=1) / math.sqrt(3)
        apart_N = (rebuilt_N - torch.from_numpy(stored_N.copy())).abs()
        return apart_N.double().numpy(), (FLOAT_NATS + DEVIATIONS * spread_N).double().numpy()

    def _slopes(self, hidden_ND: Tensor, probs_NV: Tensor, ids_N: Tensor) -> Tensor:
        """Derivative of the sampled token's log-probability by the hidden state, [N, D]."""
        head = self.head
        steep_NV = torch.ones_like(probs_NV)
        if head.softcap is not None:
            capped_NV = head.logits(hidden_ND) * (head.temperature / head.softcap)
            steep_NV = 1 - capped_NV.square()
        own_N1 = steep_NV.gather(1, ids_N[:, None])
        mean_ND = (probs_NV * steep_NV) @ head.weight_VD
        return (own_N1 * head.weight_VD[ids_N] - mean_ND) / head.temperature

    def _rounding(self, columns: HiddenColumns, hidden_ND: Tensor, usual: float | None) -> Tensor:
        """Largest error of each value by its format: half a step of int8, half a unit of bfloat16."""
        if columns.scales_N is None or columns.channels is None:
            return hidden_ND.abs() * BFLOAT16_ROUNDING
        scales_N = torch.from_numpy(columns.scales_N.copy()).clamp(max=usual)
        return 0.5 * scales_N[:, None] * torch.from_numpy(columns.channels.std_D)


def rebuilder_of(cache: Path, signal: SignalManifest, num_vocab: int) -> Rebuilder:
    """The check of a signal that keeps hidden states.

    Raises:
        CacheError: its head or statistics are missing, damaged, or not those of its manifest.
    """
    assert signal.hidden is not None, "the caller has looked"
    channels = read_channels(signal_folder(cache, signal.name), signal.hidden)
    return Rebuilder(read_head(cache, signal.hidden, num_vocab), signal.hidden, channels)


def _rows(columns: HiddenColumns, places: NDArray[np.int64]) -> HiddenColumns:
    scales_N = None if columns.scales_N is None else columns.scales_N[places]
    return HiddenColumns(columns.codes_ND[places], scales_N, columns.channels)
