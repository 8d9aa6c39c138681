"""Values of a row as people write them: checked where they enter, so that nothing later meets them first."""

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from lightopd.errors import InputError

MAX_DEPTH = 100
"""Deepest nesting of lists and objects; conversations and tools stay below a tenth of it."""
MAX_DIGITS = 400
"""Longest number that is taken; a float ends at 309 digits, an answer is shorter."""


class HugeNumber(str):
    """A whole number with more digits than Python reads, as it stands in the file."""


def check_values(value: Any, what: str) -> None:
    """Refuse what no later stage can keep: half characters, NUL, numbers without a value, deep nesting.

    Args:
        value: what JSON or Arrow gives.
        what: file, row and column, for the message.

    Raises:
        InputError: one line with `what`.
    """
    for leaf, depth in _leaves(value):
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is nested more than {MAX_DEPTH} deep; flatten it")
        fault = _fault(leaf)
        if fault is not None:
            raise InputError(f"{what} {fault}")


def _leaves(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value that holds no other, keys included, with its depth; nested without recursion."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth <= MAX_DEPTH and isinstance(one, dict):
            waiting += [(part, depth + 1) for pair in one.items() for part in pair]
        elif depth <= MAX_DEPTH and isinstance(one, list | tuple):
            waiting += [(part, depth + 1) for part in one]
        else:
            yield one, depth


def _fault(leaf: Any) -> str | None:
    if isinstance(leaf, HugeNumber):
        return f"holds a number of {len(leaf)} digits; write it as text"
    if isinstance(leaf, str):
        return _text_fault(leaf)
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return f"holds {leaf}, which is no number; correct or remove it"
    if isinstance(leaf, int) and leaf.bit_length() > MAX_DIGITS * 4:
        return f"holds a number of more than {MAX_DIGITS} digits; write it as text"
    if isinstance(leaf, Decimal) and (not leaf.is_finite() or abs(leaf.adjusted()) > MAX_DIGITS):
        return f"holds {leaf:.3e}, which is beyond {MAX_DIGITS} digits; write it as text"
    return None


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return f"holds a NUL character at place {text.index(chr(0)) + 1}; remove it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        return (
            f"holds half a character (surrogate U+{half:04X} at place {error.start + 1}), as when a text is "
            "cut inside an emoji; write the whole character or remove it"
        )
    return None


def answer_text(answer: Any, where: str) -> str | None:
    """An answer as text; whole numbers lose `.0`, which tables with gaps add to integers."""
    check_values(answer, f"{where}: `answer`")
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        raise InputError(f"{where}: `answer` is {told(answer)}; it must be text or a finite number")
    return str(int(answer)) if answer == int(answer) else str(answer)


def identifier(value: Any, where: str) -> str | None:
    """A row's `id` as text: text, or a whole number, which a table with gaps holds as 3.0."""
    check_values(value, f"{where}: `id`")
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | None) or value == "":
        raise InputError(f"{where}: `id` is {told(value)}; it must be text or a whole number")
    return None if value is None else str(value)


def text_or_none(value: Any, what: str) -> str | None:
    """Text or nothing."""
    check_values(value, what)
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{what} is {told(value)}; it must be text")


def told(value: Any) -> str:
    """A value for a message: cut, with its type."""
    shown = repr(value)
    return f"{shown[:60]}{'...' if len(shown) > 60 else ''} ({type(value).__name__})"
