"""Cached rollouts as the sequences that an engine scores."""

import pyarrow.parquet as pq

from lightopd.cache.shards import shard_path
from lightopd.cache.store import Cache, rollouts_folder
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError
from lightopd.schemas.records import Sequence


def read_sequences(cache: Cache, shard: int) -> tuple[list[str], list[Sequence]]:
    """Rollout ids and sequences of one shard, in its order.

    Raises:
        CacheError: the file cannot be read or its pages fail their checksums.
    """
    path = shard_path(rollouts_folder(cache.path), shard)
    try:
        table = pq.read_table(
            path, columns=["rollout_id", "prompt_ids", "response_ids"], page_checksum_verification=True
        )
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: damaged ({error}); copy it again or make the rollouts again") from error
    prompts, responses = split_lists(table.column("prompt_ids")), split_lists(table.column("response_ids"))
    pairs = zip(prompts, responses, strict=True)
    sequences = [Sequence(p, r) for p, r in pairs if p is not None and r is not None]
    return table.column("rollout_id").to_pylist(), sequences
