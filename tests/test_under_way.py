"""What is under way is told with how far it is: tokens within a shard, micro-batches of a step."""

import numpy as np
import pytest
from tiny_models import save_model

from lightopd import under_way
from lightopd.engines.kinds import load_engine
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig
from lightopd.schemas.records import Sequence
from lightopd.under_way import doing, each_told, now_doing, so_far


@pytest.fixture
def told(monkeypatch):
    """Everything that was told of how far the innermost work is."""
    lines = []
    told_before = under_way.so_far

    def hear(how_far):
        told_before(how_far)
        lines.append(now_doing())

    for module in ("lightopd.engines.hf.score", "lightopd.engines.hf.generate", "lightopd.under_way"):
        monkeypatch.setattr(f"{module}.so_far", hear)
    return lines


def test_the_innermost_work_is_told_with_how_far_it_is():
    so_far("nobody hears it")
    assert now_doing() is None
    with doing("outer"):
        so_far("1 of 2")
        with doing("inner"):
            assert now_doing() == "inner"
        assert now_doing() == "outer, 1 of 2"
        assert [now_doing() for _ in each_told("ab", "part")] == ["part, 1 of 2", "part, 2 of 2"]
    assert now_doing() is None


def test_tokens_within_a_shard_are_told(tmp_path, told):
    model = ModelConfig(path=str(save_model(tmp_path / "model", 0)))
    engine = load_engine(HfEngine(batch_tokens=16), model)
    ids = np.array([3, 4, 5, 6], dtype=np.int32)
    with doing("scoring"):
        engine.score([Sequence(ids, ids) for i in range(3)], 0)
    assert told[-1] == "scoring, 12 of 12 response tokens"
    assert told[0] != told[-1]
    with doing("sampling"):
        engine.generate([ids], SamplingConfig(max_tokens=3, temperature=0), ["a"], [])
    assert "sampling, token 2 of 1 responses" in told
    engine.close()


def test_micro_batches_of_a_step_are_told_and_a_step_that_repeats_few_rollouts(
    lightopd, world, tmp_path, told
):
    asked = ["train", "--cache", world.cache, "--student", world.sft / "student", "--out", tmp_path / "run"]
    code, _, err = lightopd(*asked, "--steps", "1", "--batch", "72", "--set", "micro_batch_tokens=256")
    assert code == 0, err
    assert "each step of 72 rollouts repeats the 24 that there are about 3 times" in err
    steps = [line for line in told if line.startswith("train: step 1, micro-batch, ")]
    assert len(steps) > 1
    assert len({line.rpartition(" of ")[2] for line in steps}) == 1
