"""A cache made of rows of other caches, with their signals and texts: nothing is sampled or scored again.

Rows stay as they are, so that what was scored stays true of them. The cache is made in a temporary folder
beside its place and renamed: whoever looks sees no cache, or the whole one.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightopd.cache.contexts import create_text, read_texts, text_folder
from lightopd.cache.index import refresh_index
from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.reader import check_rollout_ids, read_columns
from lightopd.cache.shards import write_shard
from lightopd.cache.store import Cache, create_cache, create_signal, open_cache
from lightopd.cache.tables import flat_column, rollout_id
from lightopd.errors import OutputError
from lightopd.files import put_folder, write_atomically
from lightopd.pipelines.caches.join_plan import ShardRows
from lightopd.pipelines.shared.run_folder import LOCK, writing
from lightopd.schemas.cache import ROLLOUTS, signal_columns
from lightopd.schemas.manifest import CacheManifest, SignalManifest, TextManifest

Shards = Sequence[Sequence[ShardRows]]
"""For each shard of the new cache, the rows that make it."""


@dataclass(frozen=True, slots=True)
class Remade:
    """What a new cache is made of."""

    sources: Sequence[Cache]
    """Opened with the signals that are taken over."""
    shards: Shards
    first_samples: Mapping[tuple[int, str], int]
    """By source and prompt: what is added to the number of a sample, where earlier sources have some."""


@contextlib.contextmanager
def made_beside(out: Path) -> Iterator[Path]:
    """A folder to make `out` in, which gets its name when the block ends well; held by one process.

    Raises:
        OutputError: `out` has something in it, or another process makes it.
    """
    refuse_taken(out)
    part = out.with_name(f".{out.name}.making.tmp")
    with writing(part):
        for left in part.iterdir():  # by a process that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield part
            (part / LOCK).unlink()
            refuse_taken(out)
            put_folder(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def refuse_taken(out: Path) -> None:
    """Refuse a place where something lies.

    Raises:
        OutputError: says so.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} is there already, and is not replaced; name a new folder")


def make_rollouts(path: Path, manifest: CacheManifest, plan: Remade) -> Cache:
    """Write the rollouts of the new cache.

    Raises:
        CacheError: a file of a source is damaged.
        OutputError: no permission or no space.
    """
    create_cache(path, manifest)
    folder, fingerprint = rollouts_folder(path), manifest.fingerprint()
    for index, parts in enumerate(plan.shards):
        tables = [
            _renumbered(
                _taken(read_columns(plan.sources[part.cache], part.shard, ROLLOUTS.names), part), plan, part
            )
            for part in parts
        ]
        table = pa.concat_tables(tables)
        write_shard(folder, index, table, kind="rollouts", fingerprint=fingerprint, made_from=manifest)
    return open_cache(path, signals=())


def make_signal(made: Cache, manifest: SignalManifest, plan: Remade) -> None:
    """Write a signal beside the new rollouts; its manifest speaks of them.

    Raises:
        CacheError: a file of a source is damaged, or not aligned with its rollouts.
        OutputError: no permission or no space.
    """
    create_signal(made, manifest)
    folder, names = signal_folder(made.path, manifest.name), signal_columns(manifest.hidden).names
    for index, parts in enumerate(plan.shards):
        tables = []
        for part in parts:
            source = plan.sources[part.cache]
            table = read_columns(source, part.shard, names, manifest.name)
            own = read_columns(source, part.shard, ["rollout_id"]).column("rollout_id")
            check_rollout_ids(source.file(part.shard, manifest.name), table.column("rollout_id"), own)
            tables.append(_taken(table, part))
        table = _under_ids(pa.concat_tables(tables), made, index)
        kind, fingerprint = manifest.kind, manifest.fingerprint()
        write_shard(folder, index, table, kind=kind, fingerprint=fingerprint, made_from=manifest)


def make_text(made: Cache, manifest: TextManifest, plan: Remade) -> None:
    """Write a text column beside the new rollouts; its manifest speaks of them.

    Raises:
        CacheError: a file of a source is damaged, or not aligned with its rollouts.
        OutputError: no permission or no space.
    """
    create_text(made, manifest)
    folder, fingerprint = text_folder(made.path, manifest.name), manifest.fingerprint()
    for index, parts in enumerate(plan.shards):
        tables = [
            _taken(read_texts(plan.sources[part.cache], manifest.name, part.shard), part) for part in parts
        ]
        table = _under_ids(pa.concat_tables(tables), made, index)
        write_shard(folder, index, table, kind=manifest.kind, fingerprint=fingerprint)


def copy_files(folder: Path, to: Path, names: Sequence[str]) -> None:
    """Copy small files beside shards, those that are there."""
    for name in names:
        if (folder / name).is_file():
            write_atomically(to / name, (folder / name).read_bytes())


def finish(path: Path) -> Cache:
    """The new cache, whole and with its index.

    Raises:
        CacheError: it is not whole.
    """
    cache = open_cache(path)
    refresh_index(cache)
    return cache


def _taken(table: pa.Table, part: ShardRows) -> pa.Table:
    return table.take(pa.array(part.rows, pa.int64()))


def _under_ids(table: pa.Table, made: Cache, index: int) -> pa.Table:
    """The table with the ids of the new rollouts' shard."""
    ids = read_columns(made, index, ["rollout_id"]).column("rollout_id")
    place = table.schema.get_field_index("rollout_id")
    return table.set_column(place, table.schema.field(place), ids)


def _renumbered(table: pa.Table, plan: Remade, part: ShardRows) -> pa.Table:
    """Rollouts whose numbers go on after those of earlier sources, under the ids that follow from them."""
    prompts = table.column("prompt_id").to_pylist()
    added = [plan.first_samples.get((part.cache, prompt), 0) for prompt in prompts]
    if not any(added):
        return table
    numbers = pc.add(table.column("sample_index"), pa.array(added, pa.int32()))
    table = _replaced(table, "sample_index", numbers)
    manifest = plan.sources[part.cache].manifest
    samplers = {source.origin: source.sampler.identity for source in manifest.joined}
    own = manifest.sampler.identity if manifest.sampler else ""
    by_row = [samplers.get(origin, own) for origin in table.column("origin").to_pylist()]
    rows = zip(
        _lists(table, "prompt_ids"), _lists(table, "response_ids"), by_row, numbers.to_pylist(), strict=True
    )
    ids = [rollout_id(*row) for row in rows]
    return _replaced(table, "rollout_id", pa.chunked_array([pa.array(ids, pa.string())]))


def _lists(table: pa.Table, name: str) -> Iterator[Any]:
    values, offsets = flat_column(table.column(name))
    return (values[start:end] for start, end in pairwise(offsets))


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), column)
