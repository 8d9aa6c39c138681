"""Verifiers that compare a response with an answer: 1.0 when right, 0.0 when wrong."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from lightopd.errors import ConfigError, InputError

# A minus sign counts where it cannot be a hyphen, a subtraction or a range: "5-3" ends in 3, "= -3" in -3.
SIGN = r"(?:(?<![\w)\]}])-)?"
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(
    rf"{SIGN}{DIGITS}(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?|{SIGN}(?<![0-9])\.[0-9]+"
)
BOX = "\\boxed{"


def exact(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Whether the whole response is the answer, up to white space."""
    return float(response.split() == answer.split())


def last_number(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    r"""Whether the last number of the response equals that of the answer, as numbers: 1,234.0 is 1234.

    Where the response has a \boxed{...}, only what is in the last one counts.

    Raises:
        InputError: the answer has no number in it.
    """
    wanted = _last_number(answer)
    if wanted is None:
        raise InputError(f"verifier last_number needs an answer with a number in it, got {answer!r}")
    return float(_last_number(_boxed(response)) == wanted)


def math_verify(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """Whether response and answer are the same mathematical expression, by the math-verify package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError("math-verify is not installed; run: pip install math-verify") from error
    # Its time limits use a signal, which works in a process's main thread only.
    gold, found = parse(answer, parsing_timeout=None), parse(response, parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))


def is_expression(answer: str) -> bool:
    """Whether the math-verify package finds an expression in an answer."""
    from math_verify import parse

    return bool(parse(answer, parsing_timeout=None))


def _last_number(text: str) -> Decimal | None:
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\,", "")
    numbers = NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _boxed(text: str) -> str:
    r"""What stands in the last complete \boxed{...} of a text, or the whole text."""
    start = text.rfind(BOX)
    depth = 1
    for at in range(start + len(BOX), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len(BOX) : at]
    return text
