"""What must hold for the stored hidden states of a shard, without a head.

R = rollouts, N = their response tokens, D = hidden size.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from lightopd.cache.row_checks import Fault
from lightopd.cache.signals.channels import BYTES, flat_bytes, hidden_columns
from lightopd.cache.tables import flat_column
from lightopd.schemas.signals.kinds import HiddenStates

EXPONENT = 0x7F80
"""Bits of a bfloat16 that are all set in a NaN or an infinity."""


def hidden_faults(table: pa.Table, rollouts: pa.Table, described: HiddenStates) -> Iterator[Fault]:
    """Rows that have not one finite hidden state for each response token, and codes without a scale."""
    _, offsets = flat_column(rollouts.column("response_ids"))
    lengths = np.diff(offsets)
    if table.column("hidden").null_count:
        yield Fault("hidden", 0, "it has no hidden states, and its manifest says that it keeps them", 1)
        return
    _, ends = flat_bytes(table.column("hidden"))
    width = described.size * BYTES[described.format]
    is_off = np.diff(ends) != lengths * width
    if is_off.any():
        row = int(is_off.argmax())
        what = (
            f"hidden has {np.diff(ends)[row]} bytes, {lengths[row]} tokens of {described.size} values "
            f"({described.format}) need {lengths[row] * width}"
        )
        yield Fault("hidden length", row, what, int(is_off.sum()))
        return
    if described.channels is None:
        codes_ND = hidden_columns(table, described, None).codes_ND
        is_bad_N = ((codes_ND & EXPONENT) == EXPONENT).any(1)
        yield from _at("hidden", is_bad_N, offsets, "hidden is NaN or infinite")
        return
    scales_N, found = flat_column(table.column("hidden_scales"))
    if not np.array_equal(found, offsets):
        row = int((np.diff(found) != lengths).argmax())
        yield Fault("hidden_scales length", row, "hidden_scales is not as long as response_ids", 1)
        return
    is_bad_N = ~np.isfinite(scales_N) | (scales_N <= 0)
    yield from _at("hidden_scales", is_bad_N, offsets, "hidden_scales is no finite number above 0")


def _at(check: str, is_bad_N: np.ndarray, offsets: np.ndarray, what: str) -> Iterator[Fault]:
    if is_bad_N.any():
        place = int(is_bad_N.argmax())
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        yield Fault(check, row, f"{what} at position {place - offsets[row]}", int(is_bad_N.sum()))
