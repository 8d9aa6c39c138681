"""Texts that end a response: which token completes one, found by the model's own tokenizer.

A response ends with the token in which the text is complete, so its ids and log-probabilities are those that
were drawn, and the text may go on behind the string by what that token holds. Servers and vLLM look for the
same in what they generate (`include_stop_str_in_output`), and what they return is cut here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lightopd.models.tokenizer import load_tokenizer
from lightopd.schemas.configs import ModelConfig, SamplingConfig
from lightopd.schemas.records import Ids

MARGIN_TOKENS = 8
"""Tokens decoded before those that can hold a string: the first of a window may lack a space or a byte."""


class StopReader:
    """Reads one response token by token and says when its text holds one of the strings.

    A token writes at least one byte, except those that the tokenizer does not know (outputs that only pad the
    model), which are passed over; so a window of as many tokens as the longest string has bytes suffices.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt_ids: Ids) -> None:
        self._tokenizer, self._strings, self._known = tokenizer, strings, len(tokenizer)
        self._width = MARGIN_TOKENS + max(len(string.encode()) for string in strings)
        self._window = [int(token) for token in prompt_ids[-MARGIN_TOKENS:] if token < self._known]
        self._num_prompt = len(self._window)

    def is_end(self, token: int) -> bool:
        """Whether the response holds one of the strings now that `token` was drawn."""
        if token < self._known:
            self._window.append(int(token))
        dropped = max(0, len(self._window) - self._width)
        del self._window[:dropped]
        self._num_prompt = max(0, self._num_prompt - dropped)
        text = self._text(self._window)
        if not any(string in text for string in self._strings):
            return False
        own = text[len(self._text(self._window[: self._num_prompt])) :]
        return any(string in own for string in self._strings)

    def _text(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


NewReader = Callable[[Ids], StopReader]
"""A reader for the response to a prompt."""


class StopStrings:
    """The readers of an engine, whose tokenizer is loaded when strings are first asked for."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._tokenizer: Any = None

    def readers(self, sampling: SamplingConfig) -> NewReader | None:
        """Makes the reader of a response; None where no string ends one."""
        if not sampling.stop:
            return None
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._model)
        return readers_of(self._tokenizer, sampling)


def readers_of(tokenizer: Any, sampling: SamplingConfig) -> NewReader | None:
    """Makes the reader of a response, given a tokenizer; None where no string ends one."""
    if not sampling.stop:
        return None
    return lambda prompt_ids: StopReader(tokenizer, sampling.stop, prompt_ids)
