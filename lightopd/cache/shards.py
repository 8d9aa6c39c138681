"""One shard: a Parquet file that exists whole or not at all, and the marker that says so.

The file is written under a dot name in its own folder, flushed to the disk and renamed; the marker
(`part-NNNNN.json`: rows, tokens, size, SHA-256, fingerprint) follows in the same way. A Parquet file without
its marker is not a shard: the next run writes it again, with the same bytes. A shard has one writer.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from lightopd.files import json_bytes, write_atomically
from lightopd.schemas.cache import SCHEMA_VERSION, shard_metadata
from lightopd.schemas.manifest import ShardMarker

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
    "topk_ids",
    "topk_logprobs",
    "tail_logprobs",
)
"""Columns of numbers, written byte by byte (BYTE_STREAM_SPLIT): their high bytes repeat."""


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
) -> ShardMarker:
    """Write a shard and its marker durably; equal tables give equal bytes.

    Args:
        folder: `rollouts` or `signals/<name>` of a cache; made where it is missing.
        index: number of the shard, from 0.
        table: rows in the schema of `lightopd.schemas.cache`.
        kind: `rollouts` or `signals/<name>`; stored in the file.
        fingerprint: of the manifest that the shard belongs to; stored in file and marker.
        dropped: rows left out, by reason.

    Raises:
        OutputError: no permission, no space, or another failure of the disk; nothing half-written stays.
    """
    content = shard_bytes(table, kind=kind, fingerprint=fingerprint)
    marker = ShardMarker(
        rows=table.num_rows,
        tokens=_response_tokens(table),
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        fingerprint=fingerprint,
        dropped=dict(sorted((dropped or {}).items())),
    )
    write_atomically(shard_path(folder, index), content)
    write_atomically(marker_path(folder, index), json_bytes(marker.model_dump(mode="json")))
    return marker


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
    if marker is None:
        return "it has no readable marker"
    if not path.is_file():
        return "its Parquet file is missing"
    if marker.fingerprint != fingerprint:
        return f"it was made under fingerprint {marker.fingerprint[:12]}, not {fingerprint[:12]}"
    size_bytes = path.stat().st_size
    if size_bytes != marker.size_bytes:
        return f"it has {size_bytes} bytes, its marker says {marker.size_bytes}"
    if file_sha256(path) != marker.sha256:
        return "its SHA-256 is not the one in its marker"
    return None


def read_marker(folder: Path, index: int) -> ShardMarker | None:
    """The marker of a shard; None when it is missing or broken."""
    try:
        return ShardMarker.model_validate_json(marker_path(folder, index).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metadata_faults(schema: pa.Schema, kind: str, fingerprint: str) -> Iterator[str]:
    """What a shard says of itself and should not: it was made as another part, or under other settings."""
    found = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    versions = (shard_metadata(kind, fingerprint, version) for version in range(SCHEMA_VERSION, 0, -1))
    wanted = next((each for each in versions if each.items() <= found.items()), None)
    if wanted is None:
        for key, value in shard_metadata(kind, fingerprint).items():
            if found.get(key) != value:
                yield f"its metadata {key} is {found.get(key)!r}, not {value!r}"


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
