"""Which row of which cache goes into which shard of a joined cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightopd.cache.reader import read_columns
from lightopd.cache.store import Cache
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError
from lightopd.schemas.records import Ids


@dataclass(frozen=True, slots=True)
class ShardRows:
    """Rows of one shard of one source."""

    cache: int
    """Place of the source among the sources."""
    shard: int
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of a joined cache."""

    shards: tuple[tuple[ShardRows, ...], ...]
    """Each of rows of one origin; they take turns, so that answers to one prompt lie near each other."""
    rollout_ids: tuple[str, ...]
    """Of all rows, in order."""
    num_prompts: int
    num_teacher: int
    dropped: Mapping[str, int]
    """Rows left out, by reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout of one source, and where it lies."""

    cache: int
    shard: int
    row: int
    rollout_id: str
    prompt_id: str
    sample_index: int


def plan_rows(caches: Sequence[Cache], shard_rollouts: int, *, pairs: bool) -> Plan:
    """Rows in the order of the sources, each content once, in shards of `shard_rollouts` rows.

    With `pairs`, one row of the teacher and one of the student, those of the lowest sample index, are kept of
    each prompt that has both (arXiv 2604.03873), in the order of the teacher's rows.

    Raises:
        CacheError: a prompt has other ids in one source than in another, or no prompt has both.
    """
    rows: dict[str, list[Row]] = {"teacher": [], "student": []}
    seen: set[str] = set()
    num_rows = 0
    for row in all_rows(caches):
        num_rows += 1
        if row.rollout_id not in seen:
            seen.add(row.rollout_id)
            rows[caches[row.cache].manifest.origin].append(row)
    dropped = {"in an earlier cache already": num_rows - len(seen)}
    if pairs:
        dropped |= _keep_pairs(rows)
    shards = _turns(_cut(rows["teacher"], shard_rollouts), _cut(rows["student"], shard_rollouts))
    kept = [row for shard in shards for row in shard]
    return Plan(
        shards=tuple(tuple(_parts(shard)) for shard in shards),
        rollout_ids=tuple(row.rollout_id for row in kept),
        num_prompts=len({row.prompt_id for row in kept}),
        num_teacher=len(rows["teacher"]),
        dropped={reason: number for reason, number in dropped.items() if number},
    )


def all_rows(caches: Sequence[Cache]) -> Iterator[Row]:
    """Every row of every source; a prompt's ids are compared with those of its first row."""
    prompts: dict[str, Ids] = {}
    columns = ("rollout_id", "prompt_id", "sample_index", "prompt_ids")
    for number, cache in enumerate(caches):
        for shard in cache.shards:
            path = cache.file(shard)
            table = read_columns(cache, shard, columns)
            plain = (table.column(name).to_pylist() for name in columns[:3])
            for place, (rollout, prompt, sample, ids) in enumerate(
                zip(*plain, split_lists(table.column("prompt_ids")), strict=True)
            ):
                assert ids is not None, "never null on disk"
                if not np.array_equal(prompts.setdefault(prompt, ids), ids):
                    raise CacheError(
                        f"{path} row {place}: prompt {prompt} has other ids here than in a row before; use "
                        "one prompts file and one rendering for all caches"
                    )
                yield Row(number, shard, place, rollout, prompt, sample)


def _keep_pairs(rows: dict[str, list[Row]]) -> dict[str, int]:
    """Leave one row of each origin for each prompt that has both; numbers of rows left out, by reason."""
    first: dict[str, dict[str, Row]] = {}
    for origin, found in rows.items():
        first[origin] = {}
        for row in found:
            best = first[origin].get(row.prompt_id)
            if best is None or row.sample_index < best.sample_index:
                first[origin][row.prompt_id] = row
    both = [prompt for prompt in first["teacher"] if prompt in first["student"]]
    if not both:
        raise CacheError(
            "no prompt has both an answer of the teacher and a rollout of the student; make both caches "
            "from the same prompts"
        )
    further = sum(len(found) - len(first[origin]) for origin, found in rows.items())
    dropped = {
        "teacher's answer without a student's": len(first["teacher"]) - len(both),
        "student's rollout without a teacher's": len(first["student"]) - len(both),
        "further answers to a prompt": further,
    }
    for origin in rows:
        rows[origin] = [first[origin][prompt] for prompt in both]
    return dropped


def _cut(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _turns(one: list[Sequence[Row]], other: list[Sequence[Row]]) -> list[Sequence[Row]]:
    """Both lists in one, each spread evenly over the whole."""
    places = [
        ((i + 0.5) / len(some), which, i) for which, some in enumerate((one, other)) for i in range(len(some))
    ]
    return [(one, other)[which][i] for _, which, i in sorted(places)]


def _parts(rows: Sequence[Row]) -> Iterator[ShardRows]:
    """Runs of rows that lie in one file."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (rows[end].cache, rows[end].shard) != (rows[start].cache, rows[start].shard):
            yield ShardRows(rows[start].cache, rows[start].shard, [row.row for row in rows[start:end]])
            start = end
