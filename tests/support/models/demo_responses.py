"""Responses to the demo task that its models are made with: right ones, and ones with a slip."""

import random
from itertools import accumulate


def longest_prompt(addends: int) -> str:
    """The longest prompt of so many numbers, ``50+50+50+50=`` for four."""
    return "+".join(["50"] * addends) + "="


def reference_response(prompt: str, *, from_last: bool = False) -> str:
    """The right response to a prompt, ``19,49,90`` for ``12+7+30+41=``; ``71,78,90`` from the last number on.

    Raises:
        ValueError: the prompt is not a sum of whole numbers that ends in ``=``.
    """
    return ",".join(map(str, list(accumulate(_addends(prompt, from_last)))[1:]))


def corrupted_response(prompt: str, rng: random.Random, *, from_last: bool = False) -> tuple[str, int]:
    """A response with one wrong digit that continues correctly from the wrong total.

    A teacher that has only ever seen right prefixes is in unknown territory after a student's
    first slip, and what it says there is noise. This is what it learns from instead: one digit of
    one total is replaced, the other digits of that total stay, and every later total adds to what
    is written.

    Returns:
        The response, and the index in it of the wrong digit, which no model should be taught.

    Raises:
        ValueError: the prompt is not a sum of whole numbers that ends in ``=``.
    """
    addends = _addends(prompt, from_last)
    totals = list(accumulate(addends))[1:]
    wrong = rng.randrange(len(totals))
    digits = str(totals[wrong])
    at = rng.randrange(len(digits))
    digit = rng.choice([d for d in "0123456789" if d != digits[at]])
    written = digits[:at] + digit + digits[at + 1 :]
    before = [str(total) for total in totals[:wrong]]
    after = [str(total) for total in accumulate(addends[wrong + 2 :], initial=int(written))][1:]
    return ",".join([*before, written, *after]), sum(len(total) + 1 for total in before) + at


def _addends(prompt: str, from_last: bool) -> list[int]:
    """The numbers of a prompt as they are added up, refused unless the prompt has the task's form."""
    body = prompt.removesuffix("=")
    parts = body.split("+")
    if body == prompt or len(parts) < 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"expected a prompt like '12+7+30+41=', got {prompt!r}")
    return [int(part) for part in (reversed(parts) if from_last else parts)]
