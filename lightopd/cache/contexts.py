"""What models were shown beside the student's own prompts: contexts of signals, columns of written texts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from lightopd.cache.buckets.mirrors import size_of
from lightopd.cache.manifests import read_manifest
from lightopd.cache.reader import read_columns
from lightopd.cache.shards import AGAIN, WRITE_OPTIONS, read_content, read_marker, shard_path
from lightopd.cache.store import Cache, create_part
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError, InputError
from lightopd.files import write_atomically
from lightopd.prompts.tokens import prompt_text
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import list_of, shard_metadata
from lightopd.schemas.configs import ContextConfig
from lightopd.schemas.manifest import TEXT_MANIFEST, TextManifest
from lightopd.schemas.prompts import SHIPPED_TEMPLATES
from lightopd.schemas.records import Floats, Ids

CONTEXTS = "contexts.parquet"
"""File of a signal's rendered prompts, in its folder."""

Contexts = Mapping[str, Ids]
"""Ids of the rendered prompt, int32, by prompt id, or by rollout id where each rollout has its own."""

_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_ids", list_of(pa.int32()), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
    ]
)


def describe_context(config: ContextConfig, contexts: Contexts) -> dict[str, JsonValue]:
    """What a signal's manifest says of its context; part of its fingerprint."""
    return {
        "kind": "template",
        "template": SHIPPED_TEMPLATES.get(config.template, config.template),
        "turn": config.turn,
        "prompts": contexts_hash(contexts),
    }


def contexts_hash(contexts: Contexts) -> str:
    """Hash over the rendered prompts, in order."""
    return canonical_hash([[prompt_id, ids.tolist()] for prompt_id, ids in contexts.items()])


def write_contexts(folder: Path, contexts: Contexts, tokenizer: Any) -> None:
    """Store the rendered prompts in a signal's folder, whole or not at all; equal ones give equal bytes.

    Raises:
        OutputError: no permission or no space.
    """
    table = pa.table(
        [
            list(contexts),
            [ids.tolist() for ids in contexts.values()],
            [prompt_text(ids, tokenizer) for ids in contexts.values()],
        ],
        schema=_SCHEMA,
    )
    _write(folder, table)


def _write(folder: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **WRITE_OPTIONS)
    write_atomically(folder / CONTEXTS, sink.getvalue())


def take_contexts(folder: Path, sources: Sequence[Path], wanted: Sequence[tuple[int, str, str]]) -> Contexts:
    """Store contexts of other signals in a signal's folder, and return them.

    Args:
        folder: of the signal.
        sources: folders of the other signals, their contexts checked.
        wanted: place among the sources, key there and key here, in the order in which they are stored; of
            several with one key the first is stored, and the others must be equal.

    Raises:
        CacheError: contexts of one key differ.
        OutputError: no permission or no space.
    """
    tables = [pq.read_table(source / CONTEXTS, schema=_SCHEMA).to_pylist() for source in sources]
    by_key = [{row["prompt_id"]: row for row in rows} for rows in tables]
    found: dict[str, dict[str, Any]] = {}
    for place, key, name in wanted:
        row = by_key[place][key]
        if found.setdefault(name, {**row, "prompt_id": name})["prompt_ids"] != row["prompt_ids"]:
            raise CacheError(f"{sources[place] / CONTEXTS}: prompt {key} has another context than elsewhere")
    _write(folder, pa.Table.from_pylist(list(found.values()), schema=_SCHEMA))
    return {name: np.asarray(row["prompt_ids"], np.int32) for name, row in found.items()}


def read_contexts(folder: Path, described: Mapping[str, JsonValue]) -> Contexts | None:
    """A signal's rendered prompts, checked against its manifest; None where it saw the student's own.

    Raises:
        CacheError: the file is missing, damaged, or not the one that was scored with.
    """
    if described.get("kind") == "plain":
        return None
    path = folder / CONTEXTS
    try:
        table = pq.read_table(path, columns=["prompt_id", "prompt_ids"], page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise CacheError(f"{path} cannot be read ({reason}); copy the signal's folder again") from error
    pairs = zip(table.column("prompt_id").to_pylist(), split_lists(table.column("prompt_ids")), strict=True)
    contexts = {prompt_id: ids for prompt_id, ids in pairs if ids is not None}
    if contexts_hash(contexts) != described.get("prompts"):
        raise CacheError(f"{path} holds other prompts than the signal was scored with; copy it again")
    return contexts


def check_lengths(contexts: Contexts, longest: Mapping[str, int], context_length: int, model: str) -> None:
    """Refuse a context that leaves no room for its longest response.

    Args:
        contexts: rendered prompts.
        longest: tokens of the longest response, by prompt id.
        context_length: most tokens the scoring model takes.
        model: its name, for the message.

    Raises:
        InputError: names the first prompt that does not fit.
    """
    for prompt_id, ids in contexts.items():
        if len(ids) + longest[prompt_id] > context_length:
            raise InputError(
                f"prompt {prompt_id}: its context has {len(ids)} tokens and its longest response "
                f"{longest[prompt_id]}, the context of {model} holds {context_length}; shorten the template "
                "or the columns it names"
            )


def text_folder(path: Path, name: str) -> Path:
    """Folder of a text column's manifest and shards."""
    return path / "texts" / name


def text_names(path: Path) -> tuple[str, ...]:
    """Names of the text columns in a cache folder, sorted."""
    return tuple(sorted(file.parent.name for file in (path / "texts").glob(f"*/{TEXT_MANIFEST}")))


def text_shards(cache: Cache, name: str) -> tuple[Path, ...]:
    """Files of a text column, relative to the cache folder: those that are there and of its settings.

    Raises:
        CacheError: there is no such column, or it speaks of other rollouts than the cache's.
    """
    fingerprint, folder = open_text(cache, name).fingerprint(), text_folder(cache.path, name)
    markers = {shard: read_marker(folder, shard) for shard in cache.shards}
    return tuple(
        shard_path(text_folder(Path(), name), shard)
        for shard, marker in markers.items()
        if marker is not None
        and marker.fingerprint == fingerprint
        and size_of(shard_path(folder, shard)) is not None
    )


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
    if not table.schema.equals(manifest.columns) or any(metadata.get(key) != wanted[key] for key in wanted):
        raise CacheError(f"{path} is another part or has other columns than a text; {AGAIN}")
    if table.column("rollout_id") != read_columns(cache, shard, ["rollout_id"]).column("rollout_id"):
        raise CacheError(f"{path}: its rollout_id are not those of the rollouts' shard; {AGAIN}")
    return table


def text_values(cache: Cache, name: str, shard: int) -> Floats:
    """Numbers of one shard of a text column, float32, NaN where there is none.

    Raises:
        CacheError: it is missing or damaged, or not aligned with the rollouts.
    """
    column = read_texts(cache, name, shard).column("value")
    values: Floats = column.to_numpy().astype(np.float32)
    return values


def scored_chunks(cache: Cache, name: str, shard: int) -> Floats:
    """Chunks of one shard of branched rollouts: first token, token after the last, sum and number of scores.

    float32 [R, M, 4], NaN where a rollout has fewer than M chunks.

    Raises:
        CacheError: it is missing or damaged, its rollouts were not branched, or tokens were put in.
    """
    manifest = open_text(cache, name)
    if manifest.branches is None or manifest.branches.force:
        raise CacheError(
            f"text {name} of {cache.path} has no continuations of the rollouts' own tokens; make it with "
            "`lightopd rewrite --gives branches` and force 0"
        )
    table = read_texts(cache, name, shard)
    found = np.full((table.num_rows, manifest.branches.places, 4), np.nan, np.float32)
    lists = (split_lists(table.column(one)) for one in ("places", "chunk_counts", "scores"))
    for row, (places, counts, scores) in enumerate(zip(*lists, strict=True)):
        if places is None or counts is None or scores is None or not len(places):
            continue
        by_chunk = scores.reshape(len(places), -1)
        columns = (places, places + counts, by_chunk.sum(1), np.full(len(places), by_chunk.shape[1]))
        found[row, : len(places)] = np.stack(columns, axis=1)
    return found


def text_contents(cache: Cache, names: Sequence[str]) -> list[str]:
    """Fingerprints and hashes of text columns, of which a run's weights follow.

    Raises:
        CacheError: there is no such column.
    """
    found: list[str] = []
    for name in sorted(set(names)):
        found.append(open_text(cache, name).fingerprint())
        markers = (read_marker(text_folder(cache.path, name), shard) for shard in cache.shards)
        found += [marker.sha256 if marker else "" for marker in markers]
    return found


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
