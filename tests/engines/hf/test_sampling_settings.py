"""top_k, min_p and stop ids of the transformers engine, on distributions that are known."""

import pytest
import torch

from lightopd.config import load_stage
from lightopd.engines.hf.generate import draw
from lightopd.errors import ConfigError
from lightopd.pipelines import rollout
from lightopd.schemas.configs import SamplingConfig

PROBABILITIES = torch.tensor([0.1, 0.4, 0.3, 0.05, 0.15])


def drawn(**settings):
    uniforms_B = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]
    logits_BV = PROBABILITIES.log().expand(len(uniforms_B), -1)
    ids_B, _ = draw(logits_BV, uniforms_B, SamplingConfig(**settings))
    return {token: (ids_B == token).double().mean().item() for token in sorted(set(ids_B.tolist()))}


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.3, 3: 0.05, 4: 0.15}),
        ({"top_k": 2}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 99}, {0: 0.1, 1: 0.4, 2: 0.3, 3: 0.05, 4: 0.15}),
        ({"min_p": 0.3}, {1: 0.4 / 0.85, 2: 0.3 / 0.85, 4: 0.15 / 0.85}),
        ({"min_p": 0.3, "top_k": 2, "top_p": 0.5}, {1: 1.0}),
    ],
)
def test_what_is_left_out_is_never_drawn_and_the_rest_keeps_its_shares(settings, shares):
    found = drawn(**settings)
    assert found.keys() == shares.keys()
    assert all(abs(found[token] - shares[token]) < 0.011 for token in shares)


def test_default_settings_leave_the_name_of_a_cache_as_it_was():
    assert SamplingConfig().is_raw
    assert not SamplingConfig(top_k=5).is_raw
    assert not SamplingConfig(min_p=0.1).is_raw


def sampled(world, tmp_path, *sets):
    flags = {
        "student": world.sft / "student",
        "prompts": world.root / "prompts.jsonl",
        "cache": tmp_path / "c",
    }
    return rollout.sampling_plan(load_stage("rollout", [], sets, flags)).manifest


def test_a_penalty_is_refused_by_name_where_the_engine_has_none(world, tmp_path):
    with pytest.raises(ConfigError, match=r"repetition_penalty is 1.2, which engine hf does not have"):
        sampled(world, tmp_path, "sampling.repetition_penalty=1.2")


def test_each_setting_is_part_of_the_contract_and_its_default_is_not(world, tmp_path):
    plain = sampled(world, tmp_path).fingerprint()
    assert sampled(world, tmp_path, "sampling.top_k=0", "sampling.stop_ids=[]").fingerprint() == plain
    for setting in ("top_k=5", "min_p=0.1", "stop_ids=[4]"):
        assert sampled(world, tmp_path, f"sampling.{setting}").fingerprint() != plain


def test_a_stop_id_of_ones_own_ends_a_response(world, tmp_path):
    flags = {
        "student": world.sft / "student",
        "prompts": world.root / "prompts.jsonl",
        "cache": tmp_path / "c",
    }
    every = list(range(24))
    rollout.run(load_stage("rollout", [], [f"sampling.stop_ids={every}"], flags))
    from lightopd.cache.index import query

    rows = query(
        tmp_path / "c", "select distinct len(response_ids) as n, finish_reason from rollouts"
    ).to_pylist()
    assert rows == [{"n": 1, "finish_reason": "stop"}]
