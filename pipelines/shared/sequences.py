"""Cached rollouts as the sequences that an engine scores."""

from collections.abc import Iterable

import pyarrow.compute as pc

from lightopd.cache.contexts import Contexts
from lightopd.cache.reader import read_columns
from lightopd.cache.signals.horizon import scored_length, scored_lengths
from lightopd.cache.store import Cache, open_cache
from lightopd.cache.tables import split_lists
from lightopd.schemas.configs import Horizon
from lightopd.schemas.records import Ids, Sequence, Support

COLUMNS = ["rollout_id", "prompt_id", "prompt_ids", "response_ids"]


def read_sequences(
    cache: Cache,
    shard: int,
    contexts: Contexts | None = None,
    support: str | None = None,
    horizon: Horizon | None = None,
) -> tuple[list[str], list[Sequence]]:
    """Rollout ids and sequences of one shard, in its order.

    With `contexts`, each response follows its own context, or its prompt's, and not the student's prompt;
    with `support`, it has the top-k ids of that signal; with `horizon`, responses end there.

    Raises:
        CacheError: the file cannot be read or is not the one its marker speaks of.
    """
    table = read_columns(cache, shard, COLUMNS)
    prompts, responses = split_lists(table.column("prompt_ids")), split_lists(table.column("response_ids"))
    if contexts is not None:
        names = (table.column(name).to_pylist() for name in ("rollout_id", "prompt_id"))
        prompts = [contexts[row if row in contexts else prompt] for row, prompt in zip(*names, strict=True)]
    supports = [None] * len(prompts) if support is None else read_supports(cache, shard, support)
    rows = zip(prompts, responses, supports, strict=True)
    sequences = [Sequence(p, r, s) for p, r, s in rows if p is not None and r is not None]
    ids = table.column("rollout_id").to_pylist()
    return ids, sequences if horizon is None else [_cut(one, horizon) for one in sequences]


def _cut(sequence: Sequence, horizon: Horizon) -> Sequence:
    """A sequence whose response ends at the horizon."""
    length, support = scored_length(horizon, len(sequence.response_ids)), sequence.support
    if support is not None:
        counts = support.counts[:length]
        support = Support(counts, support.ids[: int(counts.sum())])
    return Sequence(sequence.prompt_ids, sequence.response_ids[:length], support)


def first_sequences(
    cache: Cache, tokens: int, contexts: Contexts | None = None, horizon: Horizon | None = None
) -> list[Sequence]:
    """The first rollouts, as many as have so many response tokens together, or all that there are.

    Raises:
        CacheError: a shard cannot be read.
    """
    found: list[Sequence] = []
    left = tokens
    for shard in cache.shards:
        for sequence in read_sequences(cache, shard, contexts, horizon=horizon)[1]:
            if left <= 0:
                return found
            found.append(sequence)
            left -= len(sequence.response_ids)
    return found


def num_response_tokens(sequences: Iterable[Sequence]) -> int:
    """Response tokens of sequences together."""
    return sum(len(sequence.response_ids) for sequence in sequences)


def read_supports(cache: Cache, shard: int, signal: str) -> list[Support]:
    """Top-k ids of a signal at every position, row by row.

    Raises:
        CacheError: the shard cannot be read.
    """
    opened = cache if signal in cache.signals else open_cache(cache.path, signals=[signal])
    table = read_columns(opened, shard, ("topk_counts", "topk_ids"), signal)
    columns = (split_lists(table.column(name)) for name in ("topk_counts", "topk_ids"))
    return [Support(c, i) for c, i in zip(*columns, strict=True) if c is not None and i is not None]


def response_lengths(cache: Cache, horizon: Horizon | None = None) -> dict[str, int]:
    """Tokens of each response, up to the horizon, by rollout id.

    Raises:
        CacheError: a shard cannot be read.
    """
    found: dict[str, int] = {}
    for shard in cache.shards:
        table = read_columns(cache, shard, ("rollout_id", "response_ids"))
        whole = pc.list_value_length(table.column("response_ids")).to_numpy()
        lengths = scored_lengths(horizon, whole).tolist()
        found |= dict(zip(table.column("rollout_id").to_pylist(), lengths, strict=True))
    return found


def read_prompts(cache: Cache, horizon: Horizon | None = None) -> tuple[dict[str, Ids], dict[str, int]]:
    """Of each prompt, in order: its ids, and the tokens of its longest response, up to the horizon.

    Raises:
        CacheError: a shard cannot be read.
    """
    prompts: dict[str, Ids] = {}
    longest: dict[str, int] = {}
    for shard in cache.shards:
        table = read_columns(cache, shard, ("prompt_id", "prompt_ids", "response_ids"))
        names = table.column("prompt_id").to_pylist()
        columns = (split_lists(table.column(name)) for name in ("prompt_ids", "response_ids"))
        for name, prompt, response in zip(names, *columns, strict=True):
            assert prompt is not None, "never null on disk"
            assert response is not None, "never null on disk"
            prompts.setdefault(name, prompt)
            longest[name] = max(longest.get(name, 0), scored_length(horizon, len(response)))
    return prompts, longest
