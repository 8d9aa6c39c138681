"""The demo task: add up four numbers and write down every running total.

A prompt reads ``12+7+30+41=`` and the right response is ``19,49,90``: the sum of the first two
numbers, then of the first three, then of all four. The task suits a model of a few hundred
thousand parameters with one token per character, and every response is checked by arithmetic, so
a run of the whole chain on two CPU cores shows a real gain in accuracy instead of a falling loss.

Everything here is plain Python: no model, no tensor, no file.
"""

import hashlib
import random
import re
from itertools import accumulate
from typing import Literal

NUM_ADDENDS = 4
MAX_ADDEND = 50
MAX_PROMPT_CHARS = len("50+50+50+50=")
MAX_RESPONSE_CHARS = len("100,150,200")
HELD_OUT_SHARE = 16
"""One prompt in this many is held out."""

Split = Literal["train", "heldout"]


def running_totals(seed: int, count: int, split: Split = "train") -> list[dict[str, str]]:
    """Draw `count` different prompts of one split, each with its final total as `answer`.

    The same seed gives the same list, and a shorter list is a prefix of a longer one. The split
    of a prompt depends on its text alone, so no seed can bring a held-out prompt into training.

    Returns:
        Dicts with the keys `prompt` (``12+7+30+41=``) and `answer` (``90``).

    Raises:
        ValueError: more prompts are asked for than a quick draw without repeats can give.
    """
    if not 0 <= count <= 100_000:
        raise ValueError(f"count must lie in 0..100000, got {count}")
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        addends = [rng.randint(1, MAX_ADDEND) for _ in range(NUM_ADDENDS)]
        prompt = "+".join(map(str, addends)) + "="
        if split_of(prompt) == split:
            rows[prompt] = str(sum(addends))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, from a SHA-256 of its text."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) % HELD_OUT_SHARE == 0 else "train"


def reference_response(prompt: str) -> str:
    """The right response to a prompt, ``19,49,90`` for ``12+7+30+41=``.

    Raises:
        ValueError: the prompt is not a sum of whole numbers that ends in ``=``.
    """
    return ",".join(map(str, list(accumulate(_addends(prompt)))[1:]))


def corrupted_response(prompt: str, rng: random.Random) -> tuple[str, int]:
    """A response with one wrong digit that goes on correctly from the wrong total.

    A teacher that has only ever seen right prefixes is in unknown territory after a student's
    first slip, and what it says there is noise. This is what it learns from instead: one digit of
    one total is replaced, the other digits of that total stay, and every later total adds to what
    is written.

    Returns:
        The response, and the index in it of the wrong digit, which no model should be taught.

    Raises:
        ValueError: the prompt is not a sum of whole numbers that ends in ``=``.
    """
    addends = _addends(prompt)
    totals = list(accumulate(addends))[1:]
    wrong = rng.randrange(len(totals))
    digits = str(totals[wrong])
    at = rng.randrange(len(digits))
    digit = rng.choice([d for d in "0123456789" if d != digits[at]])
    written = digits[:at] + digit + digits[at + 1 :]
    before = [str(total) for total in totals[:wrong]]
    after = [str(total) for total in accumulate(addends[wrong + 2 :], initial=int(written))][1:]
    return ",".join([*before, written, *after]), sum(len(total) + 1 for total in before) + at


def total_reward(response: str, answer: str) -> float:
    """1.0 if the response is three totals and the last is exactly the answer, else 0.0.

    Earlier totals may be wrong. The comparison is of text, so a leading zero counts as wrong, and
    so does a response that has spaces, too few or too many numbers.
    """
    totals = re.fullmatch(r"[0-9]+,[0-9]+,([0-9]+)", response)
    return float(totals is not None and totals[1] == answer)


def _addends(prompt: str) -> list[int]:
    """The numbers of a prompt, refused unless the prompt has the task's form."""
    body = prompt.removesuffix("=")
    parts = body.split("+")
    if body == prompt or len(parts) < 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"expected a prompt like '12+7+30+41=', got {prompt!r}")
    return [int(part) for part in parts]
