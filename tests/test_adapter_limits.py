"""Where adapters do not go."""

import pytest

from lightopd.schemas.run import RunConfig


def test_rounds_of_an_adapter_are_refused():
    settings = {"out": "o", "teacher": "t", "student": "s", "prompts": "p.jsonl", "rounds": {"steps": 4}}
    with pytest.raises(ValueError, match="rounds train all weights"):
        RunConfig.model_validate({**settings, "train": {"adapter": {"kind": "lora"}}})
