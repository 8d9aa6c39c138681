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
from lightopd.schemas.configs import ContextConfig, PromptRendering, PromptsConfig
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
    template = SHIPPED_TEMPLATES.get(config.template, config.template)
    renderer = ContextRenderer(template, config.prompts, config.turn, "context", tokenizer, rendering, clock)
    return {prompt_id: renderer.shown_ids(prompt_id, own_ids) for prompt_id, own_ids in asked.items()}


class ContextRenderer:
    """Renders what a model is shown instead of a rollout's own prompt."""

    def __init__(
        self,
        template: str,
        prompts: PromptsConfig,
        turn: str,
        section: str,
        tokenizer: Any,
        rendering: Mapping[str, JsonValue],
        clock: datetime | None,
    ) -> None:
        """Args as of `render_contexts`; `section` is where messages say that the settings stand.

        Raises:
            ConfigError: the template is not valid Jinja, or plain prompts are to get a system turn.
            InputError: the prompts cannot be read.
        """
        self._section, self._turn = section, turn
        self._template = _compile(template, self._setting("template"))
        self._tokenizer, self._clock = tokenizer, clock
        own_settings = {name: value for name, value in rendering.items() if name != "row_options"}
        self._settings = PromptRendering.model_validate(own_settings)
        if self._settings.render == "plain" and turn == "system":
            raise ConfigError(
                f"the rollouts' prompts are plain text, which has no system turn; set "
                f"{self._setting('turn')}: user"
            )
        self.prompts = {one.prompt_id: one for one in load_prompts(prompts, all_columns=True)}
        self._checked: set[str] = set()

    def shown_ids(self, prompt_id: str, own_ids: Ids, variables: Mapping[str, Any] | None = None) -> Ids:
        """Ids of the rendered prompt.

        Args:
            prompt_id: of the rollout's prompt.
            own_ids: its ids in the cache.
            variables: further variables of the template, laid over the columns of the prompts.

        Raises:
            InputError: the prompt is not in the file or is another one there, or the template cannot be
                filled.
        """
        prompt, where = self._asked(prompt_id, own_ids)
        shown = self._shown(prompt, where, variables or {})
        return render_prompt(shown, self._tokenizer, self._settings, self._clock)

    def text(self, prompt_id: str, own_ids: Ids, variables: Mapping[str, Any]) -> str:
        """The filled template, without the conversation around it; arguments and errors as of `shown_ids`."""
        prompt, where = self._asked(prompt_id, own_ids)
        turns = [one["content"] for one in prompt.messages or () if one["role"] == "user"]
        return self._fill(prompt, where, turns[-1] if turns else prompt.text, variables)

    def _asked(self, prompt_id: str, own_ids: Ids) -> tuple[Prompt, str]:
        if prompt_id not in self.prompts:
            raise InputError(
                f"{self._setting('prompts')} has no prompt {prompt_id}, which the cache has rollouts of; "
                "give the file the rollouts were made from, with the further columns in it"
            )
        prompt = self.prompts[prompt_id]
        where = f"{prompt.place} (id {prompt_id})"
        if prompt_id not in self._checked:
            _check_same(prompt, where, own_ids, self._tokenizer, self._settings, self._clock)
            self._checked.add(prompt_id)
        return prompt, where

    def _setting(self, name: str) -> str:
        return f"{self._section}.{name}" if self._section else name

    def _shown(self, prompt: Prompt, where: str, variables: Mapping[str, Any]) -> Prompt:
        """The same conversation with the rendered template in the place of a turn."""
        turns: Sequence[dict[str, Any]] = prompt.messages or ({"role": "user", "content": prompt.text},)
        last = max((i for i, one in enumerate(turns) if one["role"] == "user"), default=len(turns) - 1)
        text = self._fill(prompt, where, turns[last]["content"], variables)
        if self._settings.render == "plain":
            return replace(prompt, text=text)
        if self._turn == "user":
            changed = [*turns[:last], {**turns[last], "content": text}, *turns[last + 1 :]]
        else:
            changed = [
                {"role": "system", "content": text},
                *(one for one in turns if one["role"] != "system"),
            ]
        return replace(prompt, messages=tuple(changed), text=None)

    def _fill(self, prompt: Prompt, where: str, question: Any, more: Mapping[str, Any]) -> str:
        if not isinstance(question, str):
            raise InputError(
                f"{where}: its last user turn is no text, and a template fills text only; write it as text"
            )
        of_prompt = {"answer": prompt.answer, "domain": prompt.domain, "prompt": question}
        variables = {**prompt.metadata, **of_prompt, **more}
        known = {name: value for name, value in variables.items() if value is not None}
        try:
            text: str = self._template.render(known)
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(
                f"{where} cannot fill {self._setting('template')} ({error}); it has "
                f"{', '.join(sorted(known))}: correct the template, or add the column to the file"
            ) from error
        return text


def _compile(text: str, setting: str) -> Any:
    try:
        # Sandboxed: a template may come from somebody else.
        return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    except TemplateError as error:
        raise ConfigError(f"{setting} is not valid Jinja ({error}); correct it") from error


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
