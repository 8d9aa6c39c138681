"""One cache made into several by its prompts; all rollouts of a prompt stay together.

    lightopd cache split runs/cache --fraction 0.9,0.1 --out runs/parts

makes `runs/parts/part-1` and `runs/parts/part-2`, with all signals and texts. Which prompts go where follows
from a hash of their ids and the seed alone: the same on every machine, in whatever order they were sampled.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from pydantic import JsonValue

from lightopd.cache.contexts import text_names
from lightopd.cache.reader import check_rollouts
from lightopd.cache.store import Cache, open_cache
from lightopd.errors import ConfigError
from lightopd.pipelines.caches.join_plan import Row, ShardRows, all_rows
from lightopd.pipelines.maintenance.carried import carry_signals, carry_text
from lightopd.pipelines.maintenance.merge import source_of
from lightopd.pipelines.maintenance.remade import Remade, finish, made_beside, make_rollouts
from lightopd.pipelines.shared.reports import Report, save_report
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.manifest import CacheManifest


def split(out: Path, path: Path, fractions: Sequence[float], *, seed: int = 0) -> Report:
    """Make caches `out/part-1`, `out/part-2` ... of one; killed at any moment, there is none of them.

    Args:
        out: folder that is created.
        path: the cache, which stays as it is.
        fractions: share of the prompts for each part; together 1.
        seed: draws the prompts of each part.

    Raises:
        ConfigError: fractions that are not shares of one, or a part that would get no prompt.
        CacheError: the cache is incomplete or damaged.
        OutputError: `out` is there already, or cannot be written.
    """
    started_s = time.monotonic()
    if len(fractions) < 2 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            f"fractions {list(fractions)} add up to {sum(fractions):g}; give two or more, each above 0, that "
            "add up to 1"
        )
    source = open_cache(path)
    check_rollouts(source)
    rows = list(all_rows([source]))
    chosen = _parts(sorted({row.prompt_id for row in rows}), fractions, seed)
    made = []
    with made_beside(out) as folder:
        for number, prompts in enumerate(chosen, 1):
            own = [row for row in rows if row.prompt_id in prompts]
            made.append(_make(folder / f"part-{number}", source, own, f"{number} of {len(chosen)}"))
    table: tuple[dict[str, JsonValue], ...] = tuple(
        {
            "part": str(out / cache.path.name),
            "prompts": cache.manifest.num_prompts,
            "rollouts": cache.num_rollouts,
            "response_tokens": cache.num_tokens,
        }
        for cache in made
    )
    figures = {"prompts": len({row.prompt_id for row in rows}), "rollouts": len(rows)}
    return Report("split", str(out), dict(figures), rows=table, seconds=time.monotonic() - started_s)


def equal_parts(parts: int) -> list[float]:
    """Fractions of so many equal parts."""
    return [1 / parts] * parts


def _parts(prompts: Sequence[str], fractions: Sequence[float], seed: int) -> list[set[str]]:
    """Prompts of each part, drawn by hash; sizes are the fractions, rounded at the places between parts."""
    drawn = sorted(prompts, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    ends = [round(sum(fractions[: i + 1]) * len(drawn)) for i in range(len(fractions))]
    parts = [set(drawn[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if empty := next((number for number, part in enumerate(parts, 1) if not part), None):
        raise ConfigError(
            f"part {empty} would get none of {len(drawn)} prompts; make it larger, or fewer parts"
        )
    return parts


def _make(path: Path, source: Cache, rows: Sequence[Row], part: str) -> Cache:
    shards = list(_shards(rows, source.manifest.shard_rollouts))
    plan = Remade([source], shards, {})
    made = make_rollouts(path, _manifest(source, rows, len(shards), part), plan)
    carry_signals(made, plan, list(source.signals))
    for name in text_names(source.path):
        carry_text(made, plan, name)
    cache = finish(path)
    figures = {"rollouts": cache.num_rollouts, "response_tokens": cache.num_tokens}
    save_report(Report("split", str(path), dict(figures), notes=(f"part {part} of {source.path}",)), path)
    return cache


def _shards(rows: Sequence[Row], size: int) -> Iterator[list[ShardRows]]:
    """Rows in their order, cut where a shard is full; rows of one prompt that lie together stay together."""
    shard: list[Row] = []
    for _, group in groupby(rows, key=lambda row: row.prompt_id):
        run = list(group)
        if shard and len(shard) + len(run) > size:
            yield _by_file(shard)
            shard = []
        shard += run
    yield _by_file(shard)


def _by_file(rows: Sequence[Row]) -> list[ShardRows]:
    return [
        ShardRows(0, shard, [row.row for row in group])
        for shard, group in groupby(rows, key=lambda row: row.shard)
    ]


def _manifest(source: Cache, rows: Sequence[Row], num_shards: int, part: str) -> CacheManifest:
    changed = {
        "schema_version": SCHEMA_VERSION,
        "made_of": (source_of(source, len(rows), part),),
        "prompts": canonical_hash([row.rollout_id for row in rows]),
        "num_prompts": len({row.prompt_id for row in rows}),
        "num_shards": num_shards,
    }
    return source.manifest.model_copy(update=changed)
