"""A span of a response replaced by another text; the ids on either side of it stay those that were drawn."""

import re
from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np

from lightopd.errors import InputError
from lightopd.prompts.tokens import response_text
from lightopd.schemas.records import Ids


def splice(ids: Ids, pattern: str, replacement: str, tokenizer: Any, name: str) -> Ids | None:
    """The response with the first match of the pattern's group replaced; None where nothing matches.

    Only tokens that the span touches are made anew, and those between it and the next token's border.

    Args:
        ids: of the response, end token included.
        pattern: regular expression with one group, on the text without special tokens.
        replacement: what stands in the place of the group afterwards.
        tokenizer: of the ids.
        name: of the rollout, for messages.

    Raises:
        InputError: the tokenizer has no ids that say the new text.
    """
    text = response_text(ids, tokenizer)
    found = re.search(pattern, text)
    if found is None:
        return None
    begin, end = found.span(1)

    def length(count: int) -> int:
        return len(response_text(ids[:count], tokenizer))

    places = range(len(ids) + 1)
    first = max(0, bisect_right(places, begin, key=length) - 1)
    last = max(first, min(bisect_left(places, end, key=length), len(ids)))
    middle = text[length(first) : begin] + replacement + text[end : length(last)]
    inside = tokenizer.encode(middle, add_special_tokens=False)
    spliced = np.concatenate([ids[:first], np.asarray(inside, np.int32), ids[last:]]).astype(np.int32)
    if response_text(spliced, tokenizer) != text[:begin] + replacement + text[end:]:
        raise InputError(
            f"rollout {name}: no ids of this tokenizer say {replacement!r} in the place of "
            f"{found.group(1)!r}; change the template or the expression"
        )
    return spliced
