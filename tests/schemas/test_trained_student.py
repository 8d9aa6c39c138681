"""The number format of a student that is trained acts or is refused, in every stage that trains."""

import pytest
from pydantic import ValidationError

from lightopd.schemas.configs import SftConfig, TrainConfig
from lightopd.schemas.run import _as_trained

STAGES = {
    TrainConfig: {"cache": "cache", "out": "out"},
    SftConfig: {"prompts": "prompts.jsonl", "teacher": "teacher", "out": "out"},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_format_that_training_would_ignore_is_refused(stage, dtype):
    with pytest.raises(ValidationError, match=f"dtype is {dtype}, and weights are trained .* in float32"):
        stage.model_validate({**STAGES[stage], "student": {"path": "student", "dtype": dtype}})


@pytest.mark.parametrize("stage", STAGES)
def test_float32_is_what_training_does(stage):
    for dtype in ("auto", "float32"):
        stage.model_validate({**STAGES[stage], "student": {"path": "student", "dtype": dtype}})


def test_a_run_samples_in_its_format_and_trains_in_float32():
    assert _as_trained({"path": "student", "dtype": "bfloat16"}) == {"path": "student"}
