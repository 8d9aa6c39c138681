"""Are the rollouts of a shard in the order in which they were sampled?

A shard holds whole groups: the samples of one prompt stand together and count from 0. Whole groups that were
swapped show in the signals, whose rows name the same rollouts.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from lightopd.cache.row_checks import Fault
from lightopd.schemas.manifest import CacheManifest, ShardMarker


def order_faults(rollouts: pa.Table, manifest: CacheManifest, marker: ShardMarker) -> Iterator[Fault]:
    """The first row that breaks a group; none where rows were dropped, or are not of one model's sampling."""
    if manifest.sampling is None or manifest.joined or manifest.made_of or marker.dropped:
        return
    n, rows = manifest.sampling.n, np.arange(rollouts.num_rows)
    indices = rollouts.column("sample_index").to_numpy()
    prompts = np.array(rollouts.column("prompt_id").to_pylist(), dtype=object)
    is_off = (indices != rows % n) | (prompts != prompts[rows - rows % n])
    if is_off.any():
        row = int(is_off.argmax())
        what = (
            f"it is sample {indices[row]} of prompt {prompts[row]!r}, where sample {row % n} of the "
            f"{'next' if row % n == 0 else 'same'} prompt is due: rows are missing, repeated or out of order"
        )
        yield Fault("order", row, what, int(is_off.sum()))
