"""Logits to scores: the fast top-k, tails that `1 - sum` cannot give, and digits near zero."""

# N = positions, V = vocabulary; the output layer is the identity, so hidden states are the logits

import numpy as np
import pytest
import torch
from fake_engine import exact_scores

from lightopd.engines.hf.head_scores import largest, score_positions
from lightopd.models.head import Head


def score_logits(logits_NV, ids, top_k, min_probability=0.0):
    head = Head(torch.eye(logits_NV.shape[1]), None, None, 1.0)
    return score_positions(head, logits_NV, torch.tensor(ids), top_k, min_probability).arrived()


@pytest.mark.parametrize("width", [1, 7, 64, 130, 1000, 1003, 5000])
@pytest.mark.parametrize("k", [1, 2, 5, 33, 64])
def test_the_fast_topk_is_topk(width, k):
    values_NV = torch.randn(20, width, generator=torch.Generator().manual_seed(width * 100 + k))
    k = min(k, width)
    top_NK, ids_NK = largest(values_NV, k)
    torch.testing.assert_close(top_NK, values_NV.topk(k)[0], rtol=0, atol=0)
    torch.testing.assert_close(values_NV.gather(1, ids_NK), top_NK, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids_NK.tolist())


def test_the_fast_topk_survives_ties():
    values_NV = torch.zeros(3, 2000)
    values_NV[:, 1999] = 1
    top_NK, ids_NK = largest(values_NV, 20)
    assert top_NK.tolist() == [[1.0] + [0.0] * 19] * 3
    assert all(len(set(row)) == 20 and row[0] == 1999 for row in ids_NK.tolist())


def test_a_tail_of_one_in_a_billion_billion_is_exact():
    logits_NV = torch.full((1, 100), -45.0)
    logits_NV[0, :3] = torch.tensor([1.0, 0.5, 0.0])
    scores = score_logits(logits_NV, [0], 3)
    exact = exact_scores(logits_NV.double().numpy(), np.array([0]), 3, 0.0)
    assert exact.tail_logprobs[0] < np.log(1e-18)
    np.testing.assert_allclose(scores.tail_logprobs_N, exact.tail_logprobs, rtol=1e-6)


def test_a_logprob_near_zero_keeps_its_digits():
    logits_NV = torch.tensor([[100.0, 90.0, 89.0]])
    scores = score_logits(logits_NV, [0], 1)
    exact = -np.log1p(np.exp(-10.0) + np.exp(-11.0))
    assert scores.logprobs_N[0] == pytest.approx(exact, rel=1e-2, abs=1e-7)


def test_a_sampled_token_outside_the_topk_is_scored():
    scores = score_logits(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), [3], 2)
    assert scores.topk_ids_NK.tolist() == [[0, 1]]
    expected = np.array([3.0, 2.0, 1.0, 0.0]) - np.log(np.exp([3.0, 2.0, 1.0, 0.0]).sum())
    assert scores.logprobs_N[0] == pytest.approx(expected[3], abs=1e-6)
    assert scores.tail_logprobs_N[0] == pytest.approx(np.log(np.exp(expected[2:]).sum()), abs=1e-6)


def test_tokens_the_model_rules_out_have_no_mass():
    head = Head(torch.eye(4), torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]), None, 1.0)
    scores = score_positions(head, torch.zeros(1, 4), torch.tensor([0]), 2, 0.0).arrived()
    assert scores.logprobs_N[0] == pytest.approx(-np.log(2))
    assert scores.tail_logprobs_N[0] == -np.inf


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("top_k", [0, 2, 4])
def test_broken_logits_show_in_the_scores(broken, top_k):
    logits_NV = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, broken, 2.0, 3.0]])
    scores = score_logits(logits_NV, [0, 0], top_k)
    is_bad_N = np.isnan(scores.logprobs_N) | np.isnan(scores.tail_logprobs_N)
    assert is_bad_N.tolist() == [False, True]


def test_dropped_entries_are_in_the_tail():
    logits_NV = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    scores = score_logits(logits_NV, [2], 3, min_probability=0.2)
    assert scores.topk_counts_N.tolist() == [2]
    assert scores.tail_logprobs_N[0] == pytest.approx(np.log(0.2), abs=1e-6)


def test_bias_softcap_and_temperature_are_applied_in_order():
    weight_VD = torch.tensor([[1.0], [2.0], [-1.0]])
    head = Head(weight_VD, torch.tensor([0.0, 1.0, 0.5]), softcap=2.0, temperature=4.0)
    expected = 2.0 * np.tanh(np.array([3.0, 7.0, -2.5]) / 2.0) / 4.0
    np.testing.assert_allclose(head.logits(torch.tensor([[3.0]]))[0], expected, rtol=1e-6)
