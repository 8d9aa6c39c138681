"""Text to token ids and back: the tokenizer, its end tokens, and how a prompt is rendered."""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError, UndefinedError

from lightopd.errors import ConfigError, InputError
from lightopd.lineage.fingerprint import fingerprint_tokenizer, model_folder, read_json
from lightopd.models.tokenizer import load_tokenizer
from lightopd.schemas.configs import ModelConfig, PromptRendering
from lightopd.schemas.manifest import TokenizerFingerprint
from lightopd.schemas.records import Ids, Prompt

MAX_TEMPLATE_CHARACTERS = 64 * 2**20
"""Longest text that a chat template may make of one prompt; a context of ten million tokens is shorter."""
DATED = "the chat template writes the date, so a prompt has other tokens on another day"


def identified_tokenizer(model: ModelConfig) -> tuple[Any, TokenizerFingerprint]:
    """The tokenizer of a model folder, and its fingerprint with the ids that end a response.

    Raises:
        InputError: as `load_tokenizer` and `stop_ids`.
    """
    tokenizer = load_tokenizer(model)
    return tokenizer, fingerprint_tokenizer(tokenizer, stop_ids(tokenizer, model))


def stop_ids(tokenizer: Any, model: ModelConfig) -> tuple[int, ...]:
    """Every id that ends a response, ascending: the tokenizer's end token and the generation config's.

    A chat model often ends its turn with another token than the one its tokenizer calls the end, and
    says so in `generation_config.json` (or, where there is none, in `config.json`).

    Raises:
        InputError: no file names an end token, or one lies outside the tokenizer.
    """
    folder = model_folder(model).path
    path = folder / "generation_config.json"
    if not path.exists():
        path = folder / "config.json"
    named = read_json(path).get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    if not all(token is None or type(token) is int for token in listed):
        raise InputError(f"{path}: eos_token_id is {str(named)[:60]!r}; give an id, or a list of ids")
    found = {int(token) for token in [*listed, tokenizer.eos_token_id] if token is not None}
    if not found:
        raise InputError(
            f"neither the tokenizer nor the generation config in {folder} names an end token; set one"
        )
    outside = [token for token in found if not 0 <= token < len(tokenizer)]
    if outside:
        raise InputError(
            f"{path} names end token {outside[0]}, the tokenizer has {len(tokenizer)} tokens; "
            "correct eos_token_id"
        )
    return tuple(sorted(found))


def render_prompt(
    prompt: Prompt, tokenizer: Any, rendering: PromptRendering, clock: datetime | None = None
) -> Ids:
    """Token ids of a prompt, int32 [P] with P >= 1, ready for the model to answer.

    `chat` applies the tokenizer's chat template with the opening of the assistant's turn; a plain text
    becomes one user turn. `plain` encodes the text as the tokenizer itself does, with a start token
    where the model is used to one (Llama, Gemma) and none where it is not (Qwen, GPT-2).

    Args:
        clock: the time that a template which writes the date is shown; now where it is None.

    Raises:
        ConfigError: `chat` without a chat template.
        InputError: messages under `plain`, a prompt that the template refuses, or one without tokens.
    """
    if rendering.render == "plain":
        ids = tokenizer.encode(_plain_text(prompt))
    else:
        turns = prompt.messages or ({"role": "user", "content": prompt.text},)
        ids = apply_template(prompt, turns, tokenizer, rendering, clock)
    if len(ids) == 0:
        raise InputError(f"{prompt.place} has no tokens; remove it or give it text")
    return np.asarray(ids, dtype=np.int32)


def prompt_text(ids: Iterable[int], tokenizer: Any) -> str:
    """A prompt's ids as text to read, special tokens included; never encoded again."""
    return _decode(ids, tokenizer, skip_special_tokens=False)


def response_text(ids: Iterable[int], tokenizer: Any) -> str:
    """A response's ids as the text that a reward function judges: no end token, no other special token."""
    return _decode(ids, tokenizer, skip_special_tokens=True)


def _decode(ids: Iterable[int], tokenizer: Any, skip_special_tokens: bool) -> str:
    # Clean-up would join "a , b" to "a, b" with some tokenizers: a text the model did not write.
    text: str = tokenizer.decode(
        [int(token) for token in ids],
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    return text


def _plain_text(prompt: Prompt) -> str:
    if prompt.text is None or prompt.tools or prompt.template_options:
        has = "messages" if prompt.text is None else "tools" if prompt.tools else "chat_template_kwargs"
        raise InputError(f"{prompt.place} has {has}, which need a chat template; set render: chat")
    return prompt.text


def apply_template(
    prompt: Prompt,
    turns: Sequence[dict[str, Any]],
    tokenizer: Any,
    rendering: PromptRendering,
    clock: datetime | None = None,
    **how: Any,
) -> Any:
    """What the chat template makes of some turns under a prompt's tools and options.

    Args:
        how: settings of `apply_chat_template`; without any, ids with the opening of the assistant's turn.

    Raises:
        ConfigError: no chat template.
        InputError: the template fails on a turn, which is named with its file and row.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the student's tokenizer has no chat template; set render: plain, or add a chat_template.jinja "
            "to its folder"
        )
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, **how}
    variables = {**rendering.template_options, **prompt.template_options}
    if prompt.tools:
        variables["tools"] = list(prompt.tools)
    if clock is not None:
        variables["strftime_now"] = clock.strftime
    try:
        # Text first: ids of a template that writes without end would cost minutes and all memory.
        text = tokenizer.apply_chat_template(list(turns), **{**settings, "tokenize": False}, **variables)
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise InputError(
                f"the chat template makes {len(text):,} characters of {prompt.place}, more than "
                f"{MAX_TEMPLATE_CHARACTERS:,}; correct the template"
            )
        if not settings["tokenize"]:
            return text
        return tokenizer.apply_chat_template(list(turns), **settings, **variables)
    except InputError:
        raise
    except Exception as error:  # a template is a program of somebody else's, and fails in any way
        raise InputError(
            _template_fault(prompt, turns, tokenizer, {**settings, **variables}, error)
        ) from error


def _template_fault(
    prompt: Prompt,
    turns: Sequence[dict[str, Any]],
    tokenizer: Any,
    settings: dict[str, Any],
    error: Exception,
) -> str:
    """The first turn with which the template fails, and the template's own words if it has any."""
    own_words = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
    reason = f": {str(error).partition(chr(10))[0]}" if own_words else ""
    for number in range(1, len(turns)):
        try:
            tokenizer.apply_chat_template(list(turns[:number]), **settings)
        except Exception:  # noqa: BLE001 - as above
            break
    else:
        number = len(turns)
    turn = turns[number - 1]
    keys = ", ".join(f"{key} ({type(value).__name__})" for key, value in turn.items() if key != "role")
    what = f"turn {number}, of role {turn['role']} with {keys}"
    return (
        f"{prompt.place} does not fit the chat template{reason} (at {what}); correct the turn or the template"
    )


def writes_the_date(tokenizer: Any) -> bool:
    """Whether the chat template asks for today's date, so that a prompt has other ids tomorrow."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def template_clock(tokenizer: Any) -> datetime | None:
    """The time that the tokenizer's chat template sees now, to the second; None where it asks for none."""
    if not writes_the_date(tokenizer):
        return None
    turns = [{"role": "user", "content": ""}]
    now = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"
    return datetime.fromisoformat(tokenizer.apply_chat_template(turns, chat_template=now, tokenize=False))


def unread_by_template(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """Those of some variables that the chat template never names."""
    template = str(tokenizer.chat_template or "")
    return sorted(name for name in set(names) if not re.search(rf"\b{re.escape(name)}\b", template))
