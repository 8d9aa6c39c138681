"""The demo task: add up a few numbers, four unless told otherwise, and write down every running total.

A prompt reads ``12+7+30+41=`` and the right response is ``19,49,90``: the sum of the first two
numbers, then of the first three, then of all four. The task suits a model of a few hundred
thousand parameters with one token per character, and every response is checked by arithmetic, so
a run of the whole pipeline on two CPU cores shows a real gain in accuracy instead of a falling loss.

Everything here is plain Python: no model, no tensor, no file.
"""

import hashlib
import random
import re
from typing import Literal

NUM_ADDENDS = 4
MAX_ADDEND = 50
HELD_OUT_SHARE = 16
"""One prompt in this many is held out."""

Split = Literal["train", "heldout"]


def running_totals(
    seed: int, count: int, split: Split = "train", addends: int = NUM_ADDENDS
) -> list[dict[str, str]]:
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
    there_are = MAX_ADDEND**addends // HELD_OUT_SHARE * (1 if split == "heldout" else HELD_OUT_SHARE - 1)
    if count > there_are // 2:
        raise ValueError(
            f"{count} prompts of {addends} numbers cannot be drawn from about {there_are} of split {split}; "
            "ask for at most half of them, or for more addends"
        )
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        numbers = [rng.randint(1, MAX_ADDEND) for _ in range(addends)]
        prompt = "+".join(map(str, numbers)) + "="
        if split_of(prompt) == split:
            rows[prompt] = str(sum(numbers))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, from a SHA-256 of its text."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8]) % HELD_OUT_SHARE == 0 else "train"


def total_reward(response: str, answer: str, addends: int = NUM_ADDENDS) -> float:
    """1.0 if the response has every running total and the last is exactly the answer, else 0.0.

    Earlier totals may be wrong. The comparison is of text, so a leading zero counts as wrong, and
    so does a response that has spaces, too few or too many numbers.
    """
    totals = re.fullmatch(rf"(?:[0-9]+,){{{addends - 2}}}([0-9]+)", response)
    return float(totals is not None and totals[1] == answer)
