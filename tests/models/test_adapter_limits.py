"""Where adapters do not go."""

import pytest

from lightopd.schemas.run import RunConfig


def test_rounds_that_merge_their_adapter_begin_with_a_fresh_optimiser():
    settings = {"out": "o", "teacher": "t", "student": "s", "prompts": "p.jsonl"}
    settings |= {"train": {"adapter": {"merge": True}}}
    with pytest.raises(ValueError, match=r"set rounds\.optimizer to fresh"):
        RunConfig.model_validate({**settings, "rounds": {"steps": 4}})
    RunConfig.model_validate({**settings, "rounds": {"steps": 4, "optimizer": "fresh"}})
