"""Cached rollouts as the sequences that an engine scores."""

import pyarrow.parquet as pq

from lightopd.cache.reader import read_columns
from lightopd.cache.shards import shard_path
from lightopd.cache.store import Cache, rollouts_folder
from lightopd.cache.tables import split_lists
from lightopd.contexts import Contexts
from lightopd.errors import CacheError
from lightopd.schemas.cache import ROLLOUTS
from lightopd.schemas.records import Ids, Sequence

COLUMNS = ["rollout_id", "prompt_id", "prompt_ids", "response_ids"]


def read_sequences(
    cache: Cache, shard: int, contexts: Contexts | None = None
) -> tuple[list[str], list[Sequence]]:
    """Rollout ids and sequences of one shard, in its order.

    With `contexts`, each response follows the context of its prompt and not the student's own prompt.

    Raises:
        CacheError: the file cannot be read or its pages fail their checksums.
    """
    path = shard_path(rollouts_folder(cache.path), shard)
    try:
        table = pq.read_table(path, columns=COLUMNS, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: damaged ({error}); copy it again or make the rollouts again") from error
    prompts, responses = split_lists(table.column("prompt_ids")), split_lists(table.column("response_ids"))
    if contexts is not None:
        prompts = [contexts[prompt_id] for prompt_id in table.column("prompt_id").to_pylist()]
    pairs = zip(prompts, responses, strict=True)
    sequences = [Sequence(p, r) for p, r in pairs if p is not None and r is not None]
    return table.column("rollout_id").to_pylist(), sequences


def read_prompts(cache: Cache) -> tuple[dict[str, Ids], dict[str, int]]:
    """Of each prompt, in order: its ids, and the tokens of its longest response.

    Raises:
        CacheError: a shard cannot be read.
    """
    prompts: dict[str, Ids] = {}
    longest: dict[str, int] = {}
    for shard in cache.shards:
        path = shard_path(rollouts_folder(cache.path), shard)
        table = read_columns(path, ROLLOUTS, ("prompt_id", "prompt_ids", "response_ids"))
        names = table.column("prompt_id").to_pylist()
        columns = (split_lists(table.column(name)) for name in ("prompt_ids", "response_ids"))
        for name, prompt, response in zip(names, *columns, strict=True):
            assert prompt is not None, "never null on disk"
            assert response is not None, "never null on disk"
            prompts.setdefault(name, prompt)
            longest[name] = max(longest.get(name, 0), len(response))
    return prompts, longest
