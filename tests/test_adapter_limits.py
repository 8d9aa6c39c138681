"""Where adapters do not go."""

import pytest

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.schemas.run import RunConfig
from lightopd.training.strategies import check_strategy


def test_an_adapter_under_fsdp_is_refused():
    finetune = FinetuneConfig(strategy="fsdp", adapter={"kind": "lora"})
    with pytest.raises(ConfigError, match="fsdp"):
        check_strategy(finetune, ObjectiveConfig())


def test_rounds_of_an_adapter_are_refused():
    settings = {"out": "o", "teacher": "t", "student": "s", "prompts": "p.jsonl", "rounds": {"steps": 4}}
    with pytest.raises(ValueError, match="rounds train all weights"):
        RunConfig.model_validate({**settings, "train": {"adapter": {"kind": "lora"}}})
