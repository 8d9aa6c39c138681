"""Prompts that a scoring model is shown instead of the student's own: rendered, stored beside the signal.

The template fills the last user turn (or a system turn) of the same conversation, which is then rendered as
the rollouts' prompts were. Only the prompt changes; the response ids stay those that were drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import JsonValue

from lightopd.cache.shards import WRITE_OPTIONS, write_atomically
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError, ConfigError, InputError
from lightopd.prompts import load_prompts
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import list_of
from lightopd.schemas.configs import ContextConfig, PromptRendering
from lightopd.schemas.contexts import SHIPPED_TEMPLATES
from lightopd.schemas.records import Ids, Prompt
from lightopd.tokens import prompt_text, render_prompt

CONTEXTS = "contexts.parquet"
"""File of a signal's rendered prompts, in its folder."""

Contexts = Mapping[str, Ids]
"""Ids of the rendered prompt, int32, by prompt id."""

_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt_ids", list_of(pa.int32()), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
    ]
)


def render_contexts(
    config: ContextConfig,
    tokenizer: Any,
    rendering: Mapping[str, JsonValue],
    asked: Mapping[str, Ids],
) -> dict[str, Ids]:
    """The scoring model's prompt for each prompt of a cache, in the order of `asked`.

    Args:
        config: template, and the prompts with the columns it names.
        tokenizer: the scoring model's; its vocabulary and chat template are those of the rollouts.
        rendering: how the rollouts' prompts became ids, from the cache's manifest.
        asked: ids of the rollouts' own prompts by prompt id.

    Raises:
        InputError: a prompt of the cache is not in the file or is another one there, or it lacks a column.
        ConfigError: the template is not valid Jinja, or plain prompts are to get a system turn.
    """
    template = _compile(SHIPPED_TEMPLATES.get(config.template, config.template))
    settings = PromptRendering.model_validate(dict(rendering))
    if settings.render == "plain" and config.turn == "system":
        raise ConfigError(
            "the rollouts' prompts are plain text, which has no system turn; set context.turn: user"
        )
    prompts = {prompt.prompt_id: prompt for prompt in load_prompts(config.prompts, all_columns=True)}
    places = {prompt_id: f"prompt {row} (id {prompt_id})" for row, prompt_id in enumerate(prompts, start=1)}
    contexts = {}
    for prompt_id, own_ids in asked.items():
        if prompt_id not in prompts:
            raise InputError(
                f"context.prompts has no prompt {prompt_id}, which the cache has rollouts of; give the file "
                "the rollouts were made from, with the further columns in it"
            )
        prompt, where = prompts[prompt_id], f"{places[prompt_id]} of context.prompts"
        _check_same(prompt, where, own_ids, tokenizer, settings)
        shown = _shown(prompt, where, template, config.turn, settings)
        contexts[prompt_id] = render_prompt(shown, tokenizer, settings)
    return contexts


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


def _compile(text: str) -> Any:
    try:
        # Sandboxed: a template may come from somebody else.
        return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    except TemplateError as error:
        raise ConfigError(f"context.template is not valid Jinja ({error}); correct it") from error


def _check_same(prompt: Prompt, where: str, own_ids: Ids, tokenizer: Any, settings: PromptRendering) -> None:
    if not np.array_equal(render_prompt(prompt, tokenizer, settings), own_ids):
        raise InputError(
            f"{where} is another text than the one the cache has rollouts of; give the file the rollouts "
            "were made from"
        )


def _shown(prompt: Prompt, where: str, template: Any, turn: str, settings: PromptRendering) -> Prompt:
    """The same conversation with the rendered template in the place of a turn."""
    turns: Sequence[dict[str, Any]] = prompt.messages or ({"role": "user", "content": prompt.text},)
    last = max((i for i, one in enumerate(turns) if one["role"] == "user"), default=len(turns) - 1)
    text = _fill(prompt, where, template, turns[last]["content"])
    if settings.render == "plain":
        return Prompt(prompt.prompt_id, None, text)
    if turn == "user":
        changed = [*turns[:last], {**turns[last], "content": text}, *turns[last + 1 :]]
    else:
        changed = [{"role": "system", "content": text}, *(one for one in turns if one["role"] != "system")]
    return Prompt(prompt.prompt_id, tuple(changed), None)


def _fill(prompt: Prompt, where: str, template: Any, question: Any) -> str:
    if not isinstance(question, str):
        raise InputError(
            f"{where}: its last user turn is no text, and a template fills text only; write it as text"
        )
    variables = {**prompt.metadata, "answer": prompt.answer, "domain": prompt.domain, "prompt": question}
    known = {name: value for name, value in variables.items() if value is not None}
    try:
        text: str = template.render(known)
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{where} cannot fill context.template ({error}); it has {', '.join(sorted(known))}: correct the "
            "template, or add the column to the file"
        ) from error
    return text
