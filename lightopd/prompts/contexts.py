"""Prompts that a scoring model is shown instead of the student's own: rendered, stored beside the signal.

The template fills the last user turn (or a system turn) of the same conversation, which is then rendered as
the rollouts' prompts were. Only the prompt changes; the response ids stay those that were drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import JsonValue

from lightopd.errors import ConfigError, InputError
from lightopd.prompts.load import load_prompts
from lightopd.prompts.tokens import DATED, render_prompt, writes_the_date
from lightopd.schemas.configs import ContextConfig, PromptRendering
from lightopd.schemas.prompts import SHIPPED_TEMPLATES
from lightopd.schemas.records import Ids, Prompt


def render_contexts(
    config: ContextConfig,
    tokenizer: Any,
    rendering: Mapping[str, JsonValue],
    asked: Mapping[str, Ids],
    clock: datetime | None = None,
) -> dict[str, Ids]:
    """The scoring model's prompt for each prompt of a cache, in the order of `asked`.

    Args:
        config: template, and the prompts with the columns it names.
        tokenizer: the scoring model's; its vocabulary and chat template are those of the rollouts.
        rendering: how the rollouts' prompts became ids, from the cache's manifest.
        asked: ids of the rollouts' own prompts by prompt id.
        clock: the time that the rollouts' prompts were shown, where their chat template writes the date.

    Raises:
        InputError: a prompt of the cache is not in the file or is another one there, or it lacks a column.
        ConfigError: the template is not valid Jinja, or plain prompts are to get a system turn.
    """
    template = _compile(SHIPPED_TEMPLATES.get(config.template, config.template))
    own_settings = {name: value for name, value in rendering.items() if name != "row_options"}
    settings = PromptRendering.model_validate(own_settings)
    if settings.render == "plain" and config.turn == "system":
        raise ConfigError(
            "the rollouts' prompts are plain text, which has no system turn; set context.turn: user"
        )
    prompts = {prompt.prompt_id: prompt for prompt in load_prompts(config.prompts, all_columns=True)}
    contexts = {}
    for prompt_id, own_ids in asked.items():
        if prompt_id not in prompts:
            raise InputError(
                f"context.prompts has no prompt {prompt_id}, which the cache has rollouts of; give the file "
                "the rollouts were made from, with the further columns in it"
            )
        prompt, where = prompts[prompt_id], f"{prompts[prompt_id].place} (id {prompt_id})"
        _check_same(prompt, where, own_ids, tokenizer, settings, clock)
        shown = _shown(prompt, where, template, config.turn, settings)
        contexts[prompt_id] = render_prompt(shown, tokenizer, settings, clock)
    return contexts


def _compile(text: str) -> Any:
    try:
        # Sandboxed: a template may come from somebody else.
        return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    except TemplateError as error:
        raise ConfigError(f"context.template is not valid Jinja ({error}); correct it") from error


def _check_same(
    prompt: Prompt,
    where: str,
    own_ids: Ids,
    tokenizer: Any,
    settings: PromptRendering,
    clock: datetime | None,
) -> None:
    if not np.array_equal(render_prompt(prompt, tokenizer, settings, clock), own_ids):
        dated = f"; {DATED}" if writes_the_date(tokenizer) else ""
        raise InputError(
            f"{where} is another text than the one the cache has rollouts of; give the file the rollouts "
            f"were made from{dated}"
        )


def _shown(prompt: Prompt, where: str, template: Any, turn: str, settings: PromptRendering) -> Prompt:
    """The same conversation with the rendered template in the place of a turn."""
    turns: Sequence[dict[str, Any]] = prompt.messages or ({"role": "user", "content": prompt.text},)
    last = max((i for i, one in enumerate(turns) if one["role"] == "user"), default=len(turns) - 1)
    text = _fill(prompt, where, template, turns[last]["content"])
    if settings.render == "plain":
        return replace(prompt, text=text)
    if turn == "user":
        changed = [*turns[:last], {**turns[last], "content": text}, *turns[last + 1 :]]
    else:
        changed = [{"role": "system", "content": text}, *(one for one in turns if one["role"] != "system")]
    return replace(prompt, messages=tuple(changed), text=None)


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
