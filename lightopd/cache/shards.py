"""One shard: a Parquet file that exists whole or not at all, and the marker that says so.

The file is written under a dot name in its own folder, flushed to the disk and renamed; the marker
(`part-NNNNN.json`: rows, tokens, size, SHA-256, fingerprint) follows in the same way. A Parquet file without
its marker is not a shard: the next run writes it again, with the same bytes. A shard has
one writer, or several of which one wins: then hard links give the names, which fail where one is taken.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lightopd.cache.buckets.mirrors import forget, mirror_of, size_of, when_here
from lightopd.cache.checks.seals import sealed, unsealed
from lightopd.errors import CacheError
from lightopd.files import file_sha256, put_if_absent, write_atomically
from lightopd.schemas.cache import (
    HIDDEN_COLUMNS,
    ROLLOUTS,
    SCHEMA_VERSION,
    SIGNALS,
    schema_of,
    shard_metadata,
)
from lightopd.schemas.manifest import CacheManifest, ShardMarker, SignalManifest
from lightopd.schemas.records import Rollout

# docs/decisions/0001-cache-layout.md has the measurements behind these settings.
WRITE_OPTIONS: Mapping[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "version": "2.6",
    "data_page_version": "1.0",
    "write_page_checksum": True,
    "write_statistics": True,
}

ROWS_PER_GROUP = 16
TOKENS_PER_GROUP = 4096
"""A row group has at least so many rows and, but for the last, about so many response tokens."""

DICTIONARY_COLUMNS = ("origin", "domain", "finish_reason", "prompt_id", "topk_counts", "turns")
"""Columns whose values repeat."""

SPLIT_COLUMNS = (
    "prompt_ids",
    "response_ids",
    "logprobs",
    "entropies",
    "behavior_logprobs",
    "topk_ids",
    "topk_logprobs",
    "tail_logprobs",
    "hidden_scales",
)
"""Columns of numbers, written byte by byte (BYTE_STREAM_SPLIT): their high bytes repeat."""


AGAIN = (
    "copy the file again from where it was made, or delete it with its marker and run the stage that made it "
    "again"
)
"""What to do about a file that is not the shard it should be."""


class Place(Protocol):
    """Where the shards of several writers lie: on a disk, or at a URL that a folder stands for."""

    def put_if_absent(self, path: Path, content: Any) -> bool:
        """Put a file in place whole, unless one of its name is there; whether the content is there now."""

    def read(self, path: Path) -> bytes:
        """Content of a file that is there.

        Raises:
            FileNotFoundError: someone removed it.
        """

    def replace(self, path: Path, content: Any) -> None:
        """Put a file in place whole, whatever is there."""


class _Disk:
    def put_if_absent(self, path: Path, content: Any) -> bool:
        return put_if_absent(path, content)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def replace(self, path: Path, content: Any) -> None:
        write_atomically(path, content, shared=True)


ON_DISK = _Disk()


def shard_path(folder: Path, index: int) -> Path:
    """Parquet file of shard `index`."""
    return folder / f"part-{index:05d}.parquet"


def marker_path(folder: Path, index: int) -> Path:
    """Marker of shard `index`."""
    return folder / f"part-{index:05d}.json"


def write_shard(
    folder: Path,
    index: int,
    table: pa.Table,
    *,
    kind: str,
    fingerprint: str,
    dropped: Mapping[str, int] | None = None,
    made_from: CacheManifest | SignalManifest | None = None,
) -> ShardMarker:
    """Write a shard and its marker durably; equal tables give equal bytes.

    Args:
        folder: `rollouts` or `signals/<name>` of a cache; made where it is missing.
        index: number of the shard, from 0.
        table: rows in the schema of `lightopd.schemas.cache`.
        kind: `rollouts` or `signals/<name>`; stored in the file.
        fingerprint: of the manifest that the shard belongs to; stored in file and marker.
        dropped: rows left out, by reason.
        made_from: the manifest that the shard belongs to, which the marker keeps.

    Raises:
        OutputError: no permission, no space, or another failure of the disk; nothing half-written stays.
    """
    content = shard_bytes(table, kind=kind, fingerprint=fingerprint)
    marker = _marker(index, table, content, fingerprint, dropped, made_from)
    write_atomically(shard_path(folder, index), content)
    write_atomically(marker_path(folder, index), _marker_bytes(marker))
    return marker


def put_shard(
    folder: Path,
    index: int,
    table: pa.Table,
    *,
    kind: str,
    fingerprint: str,
    made_from: CacheManifest | SignalManifest | None = None,
    place: Place = ON_DISK,
) -> ShardMarker:
    """Write a shard that other processes may be writing too: the first whole file stays, whoever made it.

    The marker is made from the file that is there, so that the two fit together in whatever order several
    processes come; a finished shard is never touched.

    Args:
        folder: `rollouts` or `signals/<name>` of a cache; made where it is missing.
        index: number of the shard, from 0.
        table: rows in the schema of `lightopd.schemas.cache`.
        kind: `rollouts` or `signals/<name>`; stored in the file.
        fingerprint: of the manifest that the shard belongs to; stored in file and marker.
        made_from: the manifest that the shard belongs to, which the marker keeps.
        place: where the folder's files lie.

    Returns:
        The marker that is there.

    Raises:
        FileNotFoundError: another process finished the whole part meanwhile, and cleaned up.
        OutputError: no permission, no space, or another failure of the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content, file = shard_bytes(table, kind=kind, fingerprint=fingerprint), shard_path(folder, index)
    if not place.put_if_absent(file, content) and (there := place.read(file)) != content:
        found = _whole_table(there, table, kind, fingerprint)
        if found is None:  # left by another run's settings, or by a disk that lost bytes
            place.replace(file, content)
        else:
            table, content = found, there
    marker = _marker(index, table, content, fingerprint, None, made_from)
    if place.put_if_absent(marker_path(folder, index), _marker_bytes(marker)):
        return marker
    return marker_of(place.read(marker_path(folder, index))) or marker


def _whole_table(content: bytes, wanted: pa.Table, kind: str, fingerprint: str) -> pa.Table | None:
    """The rows of a file that may be a shard without its marker; None where it is not the wanted shard."""
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            if _schema_fault(file.schema_arrow, kind, fingerprint):
                return None
            found = file.read()
    except (pa.ArrowException, UnicodeDecodeError, OSError):
        return None
    return found if found.num_rows == wanted.num_rows else None


def _marker(
    index: int,
    table: pa.Table,
    content: Any,
    fingerprint: str,
    dropped: Mapping[str, int] | None,
    made_from: CacheManifest | SignalManifest | None,
) -> ShardMarker:
    return ShardMarker(
        rows=table.num_rows,
        tokens=_response_tokens(table),
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        fingerprint=fingerprint,
        dropped=dict(sorted((dropped or {}).items())),
        shard=index,
        made_from=None if made_from is None else made_from.model_dump(mode="json"),
    )


def _marker_bytes(marker: ShardMarker) -> bytes:
    left_out = {"made_from"} if marker.made_from is None else None
    return sealed(marker.model_dump(mode="json", exclude=left_out))


def shard_bytes(table: pa.Table, *, kind: str, fingerprint: str) -> pa.Buffer:
    """The Parquet file of a table, with the cache's metadata in it."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(shard_metadata(kind, fingerprint)).combine_chunks(),
        sink,
        row_group_size=max(
            ROWS_PER_GROUP, TOKENS_PER_GROUP * table.num_rows // max(1, _response_tokens(table))
        ),
        use_dictionary=_leaf_paths(table.schema, DICTIONARY_COLUMNS),
        column_encoding=dict.fromkeys(_leaf_paths(table.schema, SPLIT_COLUMNS), "BYTE_STREAM_SPLIT"),
        **WRITE_OPTIONS,
    )
    return sink.getvalue()


def valid_shard(folder: Path, index: int, fingerprint: str) -> ShardMarker | None:
    """The marker of a shard that is whole and was made under this fingerprint; None otherwise."""
    return None if why_invalid(folder, index, fingerprint) else read_marker(folder, index)


def why_invalid(folder: Path, index: int, fingerprint: str) -> str | None:
    """What is wrong with a shard, in words; None when marker, size, SHA-256 and fingerprint all hold."""
    marker = read_marker(folder, index)
    path = shard_path(folder, index)
    size_bytes = size_of(path)
    if marker is None:
        return "it has no readable marker"
    if size_bytes is None:
        return "its Parquet file is missing"
    if marker.fingerprint != fingerprint:
        return f"it was made under fingerprint {marker.fingerprint[:12]}, not {fingerprint[:12]}"
    if size_bytes != marker.size_bytes:
        return f"it has {size_bytes} bytes, its marker says {marker.size_bytes}"
    if mirror_of(path) is None and file_sha256(path) != marker.sha256:  # a mirror's is compared as it comes
        return "its SHA-256 is not the one in its marker"
    return None


def read_marker(folder: Path, index: int) -> ShardMarker | None:
    """The marker of a shard; None when it is missing or broken."""
    try:
        return marker_of(marker_path(folder, index).read_bytes())
    except FileNotFoundError:
        return None


def marker_of(content: bytes) -> ShardMarker | None:
    """A marker from its file's bytes; None when they are broken."""
    try:
        return ShardMarker.model_validate_json(json.dumps(unsealed(json.loads(content))))
    except (ValueError, RecursionError):
        return None


def read_content(path: Path, marker: ShardMarker) -> pa.Buffer:
    """The bytes of a shard's file, once their SHA-256 was compared with the marker's.

    Raises:
        CacheError: the file cannot be read, or is not the one that the marker speaks of.
    """

    def content_here() -> pa.Buffer:
        with pa.OSFile(str(path)) as file:
            return file.read_buffer()

    try:
        content = when_here(path, marker.sha256, content_here)
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror or error}); {AGAIN}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != marker.sha256:
        forget(path)
        raise CacheError(f"{path} has SHA-256 {found[:12]}, its marker says {marker.sha256[:12]}; {AGAIN}")
    return content


def read_table(
    path: Path, kind: str, marker: ShardMarker, columns: Sequence[str], content: pa.Buffer | None = None
) -> pa.Table:
    """Columns of a shard after all that it says of itself was compared; one newer than the file is null.

    Args:
        path: of the file.
        kind: `rollouts` or `signals/<name>`.
        marker: of the shard.
        columns: to read.
        content: the file's bytes, where a caller has compared them; None reads and compares them.

    Raises:
        CacheError: the file is missing or damaged, belongs elsewhere, or has other columns.
    """
    content = read_content(path, marker) if content is None else content
    schema = ROLLOUTS if kind == "rollouts" else pa.schema([*SIGNALS, *HIDDEN_COLUMNS])
    try:
        with pq.ParquetFile(pa.BufferReader(content)) as file:
            fault = _schema_fault(file.schema_arrow, kind, marker.fingerprint)
            if fault:
                raise CacheError(f"{path} {fault}; {AGAIN}")
            table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CacheError(f"{path} cannot be read ({str(error).splitlines()[0]}); {AGAIN}") from error
    for name in set(columns) - set(table.column_names):
        field = schema.field(name)
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(list(columns))


def _schema_fault(schema: pa.Schema, kind: str, fingerprint: str) -> str | None:
    """What a shard's file says of itself and should not, in words."""
    found = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (schema.metadata or {}).items()
    }
    versions = {str(version): version for version in range(1, SCHEMA_VERSION + 1)}
    version = versions.get(found.get("lightopd.schema_version", ""), SCHEMA_VERSION)
    for key, value in shard_metadata(kind, fingerprint, version).items():
        if found.get(key) != value:
            return f"is another part: its metadata {key} is {found.get(key)!r}, not {value!r}"
    wanted = schema_of(Rollout, version) if kind == "rollouts" else _signal_schema(schema)
    for field in wanted:
        if field.name not in schema.names:
            return f"has other columns than a cache has: {field.name} is missing"
        if not schema.field(field.name).equals(field):
            own = schema.field(field.name)
            return f"has other columns than a cache has: {field.name} is {own.type}, not {field.type}"
    if schema.names != wanted.names:
        more = ", ".join(sorted(set(schema.names) - set(wanted.names))) or "the order differs"
        return f"has other columns than a cache has: {more}"
    return None


def _signal_schema(found: pa.Schema) -> pa.Schema:
    """Columns that a signal's file must have; those of hidden states where it has any of them."""
    return pa.schema([*SIGNALS, *(field for field in HIDDEN_COLUMNS if field.name in found.names)])


def _response_tokens(table: pa.Table) -> int:
    name = "response_ids" if "response_ids" in table.column_names else "logprobs"
    return sum(len(chunk.flatten()) for chunk in table.column(name).chunks)


def _leaf_paths(schema: pa.Schema, names: tuple[str, ...]) -> list[str]:
    """Parquet column paths of the given fields: a list's values lie under `list.element`."""
    return [
        f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name
        for name in names
        if name in schema.names
    ]
