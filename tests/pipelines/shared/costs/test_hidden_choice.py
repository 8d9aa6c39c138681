"""Hidden states as a choice of a dry run: their loss against the teacher itself, and when they are named."""

import numpy as np
import pytest
import torch

from lightopd.cache.signals.channels import channels_from_sums
from lightopd.engines.hf.engine import load_hf_engine
from lightopd.models.load import load_model
from lightopd.pipelines.shared.costs.choices import named
from lightopd.pipelines.shared.costs.hidden import hidden_loss, hidden_row
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.records import Sequence


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [Sequence(*(rng.integers(3, 20, size).astype(np.int32) for size in (4, 30))) for _ in range(24)]


def test_the_loss_is_the_divergence_from_the_teachers_own_distributions(world, sequences):
    engine = load_hf_engine(HfEngine(device="cpu"), ModelConfig(path=str(world.teacher), dtype="float32"))
    calibration, measured = sequences[:12], sequences[12:]
    found = hidden_loss(engine, calibration, measured)
    channels = channels_from_sums(*engine.sum_hidden(calibration), 12 * 30)
    codes = engine.score_hidden(measured, 0, 0.0, channels)
    head = engine.own_head()
    engine.close()
    model = load_model(ModelConfig(path=str(world.teacher), dtype="float32"), "cpu")
    total = 0.0
    for sequence, code in zip(measured, codes, strict=True):
        ids = torch.tensor(np.concatenate([sequence.prompt_ids, sequence.response_ids])[None]).long()
        with torch.no_grad():
            exact_NV = model(input_ids=ids).logits[0, 3:-1].double().log_softmax(1)
            states_ND = code.hidden * code.hidden_scales.astype(np.float32)[:, None]
            states_ND = torch.from_numpy(states_ND * channels.std_D + channels.mean_D)
            rebuilt_NV = head.logits(states_ND.float()).double().log_softmax(1)
        total += float((exact_NV.exp() * (exact_NV - rebuilt_NV)).sum())
    assert found == pytest.approx(total / (12 * 30), rel=0.2)  # that one starts from bfloat16 states
    assert 0 < found < 0.01


def test_nothing_is_told_without_responses_for_the_statistics(world, sequences):
    engine = load_hf_engine(HfEngine(device="cpu"), ModelConfig(path=str(world.teacher)))
    assert hidden_loss(engine, [], sequences) is None
    engine.close()


def test_hidden_states_are_named_where_they_are_the_least_that_loses_little():
    sampled = {"choice": "sampled", "bytes_float16": 4.0, "bytes_eighths": 4.0}
    sampled |= {"kl_uniform": None, "kl_shaped": None}
    wide = {**sampled, "choice": "top-128", "bytes_eighths": 300.0, "kl_shaped": 0.05}
    assert named([sampled, wide, hidden_row(sampled, 64, 3e-4)]) == "hidden"
    assert named([sampled, wide, hidden_row(sampled, 4096, 3e-4)]) == "top-128"
