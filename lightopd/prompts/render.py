"""Prompts as a model is given them: loaded, rendered to ids, and refused where no answer could be kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lightopd.errors import InputError
from lightopd.models.limits import ModelLimits, model_limits
from lightopd.models.tokenizer import load_tokenizer
from lightopd.prompts.load import recognise_prompts
from lightopd.prompts.tokens import (
    render_prompt,
    stop_ids,
    template_clock,
    unread_by_template,
    writes_the_date,
)
from lightopd.schemas.configs import ModelConfig, PromptsConfig
from lightopd.schemas.records import Ids, Prompt
from lightopd.under_way import doing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RenderedPrompts:
    """The prompts of a source and what a model needs to answer them."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Ids]
    """int32, one array for each prompt; none empty, no two equal, each shorter than the context."""
    tokenizer: Any
    stops: tuple[int, ...]
    """Ids that end a response."""
    limits: ModelLimits
    clock: datetime | None
    """The time that the chat template was shown; None where it asks for none."""
    notes: tuple[str, ...]
    """What the source was recognised as, and what of it nothing reads."""


@doing("reading and rendering prompts")
def render_prompts(
    config: PromptsConfig, model: ModelConfig, clock: datetime | None = None
) -> RenderedPrompts:
    """Load the prompts and render them with the model's tokenizer; no weights are read.

    Args:
        clock: the time that a template which writes the date is to be shown; now where it is None.

    Raises:
        InputError: unusable prompts, two with the same tokens, or one that leaves no room for a response.
        ConfigError: an unknown verifier, or no chat template.
    """
    recognised = recognise_prompts(config)
    prompts = recognised.prompts
    tokenizer = load_tokenizer(model)
    clock = (clock or template_clock(tokenizer)) if writes_the_date(tokenizer) else None
    stops = stop_ids(tokenizer, model)
    limits = model_limits(model)
    prompt_ids = [render_prompt(prompt, tokenizer, config, clock) for prompt in prompts]
    _refuse_long_prompts(prompts, prompt_ids, limits, model)
    _refuse_equal_prompts(prompts, prompt_ids)
    notes = tuple(note for note in (recognised.sentence, _unread(prompts, tokenizer, config)) if note)
    for note in notes:
        log.info("%s", note)
    return RenderedPrompts(prompts, prompt_ids, tokenizer, stops, limits, clock, notes)


def _unread(prompts: Sequence[Prompt], tokenizer: Any, config: PromptsConfig) -> str | None:
    """The variables of rows and config that the chat template never names."""
    if config.render == "plain":
        return None
    given = {name for prompt in prompts for name in prompt.template_options} | config.template_options.keys()
    given |= {"tools"} if any(prompt.tools for prompt in prompts) else set()
    unread = unread_by_template(tokenizer, given)
    return f"the chat template never reads {', '.join(unread)}" if unread else None


def _refuse_long_prompts(
    prompts: Sequence[Prompt], prompt_ids: Sequence[Ids], limits: ModelLimits, model: ModelConfig
) -> None:
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if len(ids) >= limits.context_length:
            ends = " (there the factors of its positions change, see docs/engines.md)"
            raise InputError(
                f"{prompt.place} (id {prompt.prompt_id}) has {len(ids)} tokens, the context of "
                f"{model.path} is {limits.context_length}{ends if limits.rope_switch else ''}; shorten or "
                f"remove it"
            )


def _refuse_equal_prompts(prompts: Sequence[Prompt], prompt_ids: Sequence[Ids]) -> None:
    """Rollouts are keyed by content: equal prompts would make rows that cannot be told apart."""
    seen: dict[bytes, int] = {}
    for row, ids in enumerate(prompt_ids):
        first = seen.setdefault(ids.tobytes(), row)
        if first != row:
            raise InputError(
                f"{prompts[row].place} (id {prompts[row].prompt_id}) has the tokens of "
                f"{prompts[first].place} (id {prompts[first].prompt_id}); remove one, and raise sampling.n "
                "for more rollouts"
            )
