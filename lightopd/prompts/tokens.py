"""Text to token ids and back: the tokenizer, its end tokens, and how a prompt is rendered."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jinja2 import TemplateError

from lightopd.errors import ConfigError, InputError
from lightopd.lineage.fingerprint import fingerprint_tokenizer, model_folder, read_json
from lightopd.models.tokenizer import load_tokenizer
from lightopd.schemas.configs import ModelConfig, PromptRendering
from lightopd.schemas.manifest import TokenizerFingerprint
from lightopd.schemas.records import Ids, Prompt


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


def render_prompt(prompt: Prompt, tokenizer: Any, rendering: PromptRendering) -> Ids:
    """Token ids of a prompt, int32 [P] with P >= 1, ready for the model to answer.

    `chat` applies the tokenizer's chat template with the opening of the assistant's turn; a plain text
    becomes one user turn. `plain` encodes the text as the tokenizer itself does, with a start token
    where the model is used to one (Llama, Gemma) and none where it is not (Qwen, GPT-2).

    Raises:
        ConfigError: `chat` without a chat template.
        InputError: messages under `plain`, a prompt that the template refuses, or one without tokens.
    """
    if rendering.render == "plain":
        ids = tokenizer.encode(_plain_text(prompt))
    else:
        ids = _apply_template(prompt, tokenizer, rendering.template_options)
    if len(ids) == 0:
        raise InputError(f"prompt {prompt.prompt_id} has no tokens; remove it or give it text")
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
    if prompt.text is None:
        raise InputError(
            f"prompt {prompt.prompt_id} has messages, which need a chat template; set render: chat"
        )
    return prompt.text


def _apply_template(prompt: Prompt, tokenizer: Any, options: dict[str, Any]) -> list[int]:
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the student's tokenizer has no chat template; set render: plain, or add a chat_template.jinja "
            "to its folder"
        )
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **options
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"prompt {prompt.prompt_id} does not fit the chat template: {reason}") from error
    return ids
