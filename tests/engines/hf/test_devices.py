"""The transformers engine on a GPU: scores of a CPU, and responses that score as they were drawn."""

import numpy as np
import pytest
from engine_cases import random_sequences, tiny_model

from lightopd.engines.kinds import load_engine
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig
from lightopd.schemas.records import Sequence

SHAPES = [(3, 7), (20, 1), (1, 12), (9, 30), (20, 2), (2, 9), (20, 20), (12, 20)]


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def folder(request, tmp_path):
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def engine_on(device, folder):
    return load_engine(
        HfEngine(device=device, batch_tokens=64), ModelConfig(path=str(folder), dtype="float32")
    )


def test_scores_are_those_of_a_cpu(folder, device):
    sequences = random_sequences(0, SHAPES)
    expected = engine_on("cpu", folder).score(sequences, 4)
    engine = engine_on(device, folder)
    for found, wanted in zip(engine.score(sequences, 4), expected, strict=True):
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
        np.testing.assert_allclose(found.tail_logprobs, wanted.tail_logprobs, atol=1e-4)
        np.testing.assert_allclose(found.topk_logprobs, wanted.topk_logprobs, atol=1e-4)
        assert np.array_equal(found.topk_ids, wanted.topk_ids)


def test_responses_score_as_they_were_drawn(folder, device):
    engine = engine_on(device, folder)
    prompts = [sequence.prompt_ids for sequence in random_sequences(1, SHAPES)]
    keys = [str(number) for number in range(len(prompts))]
    samples = engine.generate(prompts, SamplingConfig(max_tokens=8), keys, [2])
    drawn = [Sequence(prompt, one.response_ids) for prompt, one in zip(prompts, samples, strict=True)]
    for sample, scored in zip(samples, engine.score(drawn, 0), strict=True):
        np.testing.assert_allclose(scored.logprobs, sample.logprobs, atol=1e-4)
    again = engine.generate(prompts, SamplingConfig(max_tokens=8), keys, [2])
    assert [one.response_ids.tolist() for one in again] == [one.response_ids.tolist() for one in samples]
