"""What of a prompt is part of the contract that a cache's rollouts were made under."""

import json

import pytest

from lightopd.config import load_stage
from lightopd.pipelines import rollout


def contract(world, tmp_path, *, verifier="exact", **changed):
    """The hash of two prompts, the second with some of its fields changed."""
    fields = {"prompt": "3+4=", "answer": "7", "id": "b", "domain": "sums"} | changed
    path = tmp_path / "prompts.jsonl"
    rows = ({"prompt": "1+2=", "answer": "3", "id": "a"}, fields)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_stage(
        "rollout",
        [],
        [f"prompts.verifier={verifier}"],
        {"student": world.base, "prompts": path, "cache": "x"},
    )
    return rollout.sampling_plan(config).manifest.prompts


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "3+5="}, {"answer": "8"}, {"id": "c"}, {"domain": "other"}, {"verifier": "last_number"}],
)
def test_each_part_of_a_prompt_that_decides_its_rollouts_is_in_the_contract(world, tmp_path, changed):
    assert contract(world, tmp_path, **changed) != contract(world, tmp_path)
