"""The format of the output layer's product follows the format that a pass computes in."""

import pytest
import torch
from one_rollout import one_rollout

from lightopd.models.head import Head
from lightopd.training.student.forward import evaluate_tokens

N, D, V = 64, 48, 500


def make_rollouts():
    return one_rollout(torch.arange(N) * 7 % V, {})


@pytest.mark.parametrize("is_mixed", [True, False])
def test_log_probabilities_are_those_of_factors_in_the_compute_format(is_mixed):
    torch.manual_seed(0)
    hidden_ND, weight_VD = 3 * torch.randn(N, D), torch.randn(V, D).requires_grad_()
    rollouts = make_rollouts()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        found = evaluate_tokens(hidden_ND, Head(weight_VD, None, None, 1.0), rollouts, ())
    dtype = torch.bfloat16 if is_mixed else torch.float32
    logits_NV = hidden_ND.to(dtype).double() @ weight_VD.detach().to(dtype).double().T
    expected_N = logits_NV.log_softmax(-1).gather(1, rollouts.ids_N[:, None])[:, 0]
    assert found.logprobs_N.dtype == torch.float32
    assert float((found.logprobs_N.double() - expected_N).abs().max().detach()) < 2e-5
    found.logprobs_N.sum().backward()
    assert weight_VD.grad.dtype == torch.float32
