"""A signal's rendered prompts, stored beside its scores: written, read back and checked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from lightopd.cache.shards import WRITE_OPTIONS
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError, InputError
from lightopd.files import write_atomically
from lightopd.prompts.tokens import prompt_text
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import list_of
from lightopd.schemas.configs import ContextConfig
from lightopd.schemas.prompts import SHIPPED_TEMPLATES
from lightopd.schemas.records import Ids

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
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **WRITE_OPTIONS)
    write_atomically(folder / CONTEXTS, sink.getvalue())


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
