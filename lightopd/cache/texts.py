"""Text columns of a cache: what a model was shown for each rollout, and what it wrote."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightopd.cache.reader import read_columns
from lightopd.cache.shards import AGAIN, read_content, read_marker, shard_path
from lightopd.cache.store import Cache, create_part, read_manifest
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError
from lightopd.schemas.cache import shard_metadata
from lightopd.schemas.manifest import TEXT_MANIFEST, TextManifest
from lightopd.schemas.records import Ids
from lightopd.schemas.rewriting import TEXTS


def text_folder(path: Path, name: str) -> Path:
    """Folder of a text column's manifest and shards."""
    return path / "texts" / name


def text_names(path: Path) -> tuple[str, ...]:
    """Names of the text columns in a cache folder, sorted."""
    return tuple(sorted(file.parent.name for file in (path / "texts").glob(f"*/{TEXT_MANIFEST}")))


def create_text(cache: Cache, manifest: TextManifest) -> None:
    """Make the folder of a text column, or find it there made under the same settings.

    Raises:
        OutputError: a column of this name was made under other settings, or it cannot be written.
    """
    create_part(text_folder(cache.path, manifest.name) / TEXT_MANIFEST, manifest)


def open_text(cache: Cache, name: str) -> TextManifest:
    """The manifest of a text column.

    Raises:
        CacheError: there is no such column, or it speaks of other rollouts than the cache's.
    """
    path = text_folder(cache.path, name) / TEXT_MANIFEST
    if not path.is_file():
        there = ", ".join(text_names(cache.path)) or "none"
        raise CacheError(
            f"{cache.path} has no text {name!r} (there: {there}); make it with `lightopd rewrite --name "
            f"{name}`"
        )
    manifest = read_manifest(path, TextManifest)
    if manifest.rollouts != cache.manifest.fingerprint():
        raise CacheError(
            f"{path} speaks of rollouts {manifest.rollouts[:12]}, the cache is "
            f"{cache.manifest.fingerprint()[:12]}; make the text again under another name"
        )
    return manifest


def read_texts(cache: Cache, name: str, shard: int) -> pa.Table:
    """One shard of a text column, compared with its marker and with the rollouts' shard.

    Raises:
        CacheError: it is missing or damaged, or not aligned with the rollouts.
    """
    manifest, folder = open_text(cache, name), text_folder(cache.path, name)
    path, marker = shard_path(folder, shard), read_marker(folder, shard)
    if marker is None or marker.fingerprint != manifest.fingerprint():
        raise CacheError(
            f"{path} is missing or of other settings; run `lightopd rewrite --name {name}` again to its end"
        )
    try:
        table = pq.read_table(pa.BufferReader(read_content(path, marker)))
    except pa.ArrowException as error:
        raise CacheError(f"{path} cannot be read ({str(error).splitlines()[0]}); {AGAIN}") from error
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    wanted = shard_metadata(manifest.kind, manifest.fingerprint(), manifest.schema_version)
    if not table.schema.equals(TEXTS) or any(metadata.get(key) != wanted[key] for key in wanted):
        raise CacheError(f"{path} is another part or has other columns than a text; {AGAIN}")
    if table.column("rollout_id") != read_columns(cache, shard, ["rollout_id"]).column("rollout_id"):
        raise CacheError(f"{path}: its rollout_id are not those of the rollouts' shard; {AGAIN}")
    return table


def shown_prompts(cache: Cache, name: str) -> Iterator[tuple[str, Ids]]:
    """Rollout id and the prompt that the writer was shown, row by row.

    Raises:
        CacheError: a shard is missing or damaged.
    """
    for shard in cache.shards:
        table = read_texts(cache, name, shard)
        shown: Sequence[Ids | None] = split_lists(table.column("prompt_ids"))
        for rollout_id, ids in zip(table.column("rollout_id").to_pylist(), shown, strict=True):
            assert ids is not None, "never null on disk"
            yield rollout_id, ids
