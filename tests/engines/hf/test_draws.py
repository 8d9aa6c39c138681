"""How the HF engine draws a token from a distribution."""

# B = rows, V = vocabulary

from collections import Counter

import numpy as np
import torch
from engine_cases import (
    VOCABULARY,
    hf_engine,
    tiny_model,
)

from lightopd.engines.hf.generate import draw
from lightopd.schemas.configs import SamplingConfig


def test_a_draw_is_where_the_cumulative_distribution_passes_the_uniform_number():
    logits_BV = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.59, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits_BV, uniforms, SamplingConfig(temperature=1.0, top_p=1.0))[0].tolist() == [
        0,
        0,
        1,
        1,
        3,
        3,
        4,
    ]


def test_temperature_sharpens_a_draw():
    logits_BV = torch.tensor([[0.25, 0.75]]).log()
    below, above = (torch.tensor([u], dtype=torch.float64) for u in (0.099, 0.101))
    assert draw(logits_BV, below, SamplingConfig(temperature=0.5, top_p=1.0))[0].tolist() == [0]
    assert draw(logits_BV, above, SamplingConfig(temperature=0.5, top_p=1.0))[0].tolist() == [1]


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits_BV = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(1000, -1)
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000
    assert Counter(draw(logits_BV, uniforms, SamplingConfig(temperature=1.0, top_p=0.65))[0].tolist()) == {
        1: 572,
        3: 428,
    }
    assert set(draw(logits_BV, uniforms, SamplingConfig(temperature=1.0, top_p=0.71))[0].tolist()) == {
        1,
        2,
        3,
    }
    assert set(draw(logits_BV, uniforms, SamplingConfig(temperature=1.0, top_p=1e-9))[0].tolist()) == {1}


def test_ties_at_the_edge_of_the_nucleus_go_to_the_lowest_ids():
    uniforms = torch.arange(100, dtype=torch.float64) / 100
    drawn_B, _ = draw(torch.zeros(100, 8), uniforms, SamplingConfig(temperature=1.0, top_p=0.5))
    assert set(drawn_B.tolist()) == {0, 1, 2, 3}


def test_a_wide_nucleus_is_found_in_a_large_vocabulary():
    torch.manual_seed(0)
    logits_BV = torch.randn(50, 3000)
    uniforms = torch.rand(50, dtype=torch.float64)
    drawn, _ = draw(logits_BV, uniforms, SamplingConfig(temperature=1.0, top_p=0.9))
    probabilities_BV = logits_BV.double().softmax(1)
    order_BV = probabilities_BV.argsort(1, descending=True)
    sorted_BV = probabilities_BV.gather(1, order_BV)
    is_inside_BV = (sorted_BV.cumsum(1) - sorted_BV) < 0.9
    inside_BV = torch.zeros_like(probabilities_BV).scatter(1, order_BV, sorted_BV * is_inside_BV)
    cumulative_BV = inside_BV.cumsum(1)
    expected = torch.searchsorted(cumulative_BV, uniforms[:, None] * cumulative_BV[:, -1:], right=True)[:, 0]
    assert drawn.tolist() == expected.tolist()


def test_the_lowest_of_several_most_likely_ids_is_taken_at_temperature_zero():
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    (sample,) = hf_engine(model).generate(
        [np.array([3], dtype=np.int32)], SamplingConfig(max_tokens=3, temperature=0), ["k"], []
    )
    assert sample.response_ids.tolist() == [0, 0, 0]
    np.testing.assert_allclose(sample.logprobs, -np.log(VOCABULARY), rtol=1e-6)
