"""Splices of token ids: what is replaced, and what stays."""

import numpy as np
import pytest
from tiny_models import tokenizer

from lightopd.errors import InputError
from lightopd.pipelines.sampling.splices import splice

TOKENIZER = tokenizer()


def ids(text, *, ended=True):
    return np.array([*TOKENIZER.encode(text), *([1] if ended else [])], np.int32)


@pytest.mark.parametrize(
    ("before", "pattern", "new", "after"),
    [
        ("1+2=(3)", r"\((\d+)\)", "45", "1+2=(45)"),
        ("1+2=(3)", r"^(1)", "77", "77+2=(3)"),
        ("1+2=3", r"=(\d)$", "", "1+2="),
        ("1+2=3", r"=()", "9", "1+2=93"),
    ],
)
def test_a_span_is_replaced_and_the_end_token_stays(before, pattern, new, after):
    assert splice(ids(before), pattern, new, TOKENIZER, "r").tolist() == ids(after).tolist()


def test_a_span_with_its_own_text_changes_nothing():
    assert splice(ids("1+2=3"), r"=(\d)", "3", TOKENIZER, "r").tolist() == ids("1+2=3").tolist()


def test_a_response_without_the_span_has_no_splice():
    assert splice(ids("1+2"), r"=(\d)", "3", TOKENIZER, "r") is None


def test_a_text_that_the_tokenizer_cannot_say_is_refused():
    with pytest.raises(InputError, match="rollout r: no ids of this tokenizer say 'x' in the place of '3'"):
        splice(ids("1+2=3"), r"=(\d)", "x", TOKENIZER, "r")
