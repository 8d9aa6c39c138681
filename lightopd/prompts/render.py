"""Prompts as a model is given them: loaded, rendered to ids, and refused where no answer could be kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightopd.errors import InputError
from lightopd.models.limits import ModelLimits, model_limits
from lightopd.models.tokenizer import load_tokenizer
from lightopd.prompts.load import load_prompts
from lightopd.prompts.tokens import render_prompt, stop_ids
from lightopd.schemas.configs import ModelConfig, PromptsConfig
from lightopd.schemas.records import Ids, Prompt


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


def render_prompts(config: PromptsConfig, model: ModelConfig) -> RenderedPrompts:
    """Load the prompts and render them with the model's tokenizer; no weights are read.

    Raises:
        InputError: unusable prompts, two with the same tokens, or one that leaves no room for a response.
        ConfigError: an unknown verifier, or no chat template.
    """
    prompts = load_prompts(config)
    tokenizer = load_tokenizer(model)
    stops = stop_ids(tokenizer, model)
    limits = model_limits(model)
    prompt_ids = [render_prompt(prompt, tokenizer, config) for prompt in prompts]
    _refuse_long_prompts(prompts, prompt_ids, limits.context_length, model)
    _refuse_equal_prompts(prompts, prompt_ids)
    return RenderedPrompts(prompts, prompt_ids, tokenizer, stops, limits)


def _refuse_long_prompts(
    prompts: Sequence[Prompt], prompt_ids: Sequence[Ids], context_length: int, model: ModelConfig
) -> None:
    for row, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True), start=1):
        if len(ids) >= context_length:
            raise InputError(
                f"prompt {row} (id {prompt.prompt_id}) has {len(ids)} tokens, the context of {model.path} is "
                f"{context_length}; shorten or remove it"
            )
        if len(ids) == 0:
            raise InputError(f"prompt {row} (id {prompt.prompt_id}) has no tokens; give it text or remove it")


def _refuse_equal_prompts(prompts: Sequence[Prompt], prompt_ids: Sequence[Ids]) -> None:
    """Rollouts are keyed by content: equal prompts would make rows that cannot be told apart."""
    seen: dict[bytes, int] = {}
    for row, ids in enumerate(prompt_ids):
        first = seen.setdefault(ids.tobytes(), row)
        if first != row:
            raise InputError(
                f"prompt {row + 1} (id {prompts[row].prompt_id}) has the same tokens as prompt {first + 1} "
                f"(id {prompts[first].prompt_id}); remove one, and raise sampling.n for more rollouts"
            )
