"""Measures that only the study needs, over the whole vocabulary: ExOPD's target and Theorem 3.5's bound.

B = sequences, T = positions, N = response positions of all sequences, V = vocabulary, P = parameters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.models.load import load_model
from lightopd.schemas.configs import ModelConfig

NUM_ROLLOUTS = 300
FEW_ROLLOUTS = 32
"""Rollouts at whose every position the least likely token's gradient is taken, to find the largest norm."""


class GradientGap(NamedTuple):
    """Theorem 3.5 of arXiv 2604.13010 at a student: the gradient with samples of now and of the rollout."""

    gap: float
    """Norm of the difference of both gradients, in nats per unit of the weights."""
    bound: float
    """G sigma_A sqrt(chi2), G being the largest norm of a token's gradient, as far as looked for."""
    gradient: float
    """Norm of the gradient with samples of now."""
    chi2: float
    """E[(w - 1)²] over the student at rollout, mean over the positions."""


class Responses(NamedTuple):
    """Padded ids of prompts and responses, and where a response token is predicted."""

    ids_BT: Tensor
    is_response_BT: Tensor
    """Of the positions that predict: the last is none."""


def read_responses(folder: Path) -> Responses:
    """The first rollouts of a cache or of an evaluation, prompts and responses, padded on the right."""
    files = sorted((folder / "rollouts").glob("*.parquet"))
    table = pq.read_table(files[0], columns=["prompt_ids", "response_ids"]).slice(0, NUM_ROLLOUTS)
    rows = list(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids = [[*prompt, *response, *[0] * (length - len(prompt) - len(response))] for prompt, response in rows]
    begins_B = torch.tensor([len(prompt) for prompt, _ in rows])
    ends_B = torch.tensor([len(prompt) + len(response) for prompt, response in rows])
    place_T = torch.arange(1, length)
    return Responses(torch.tensor(ids), (place_T >= begins_B[:, None]) & (place_T < ends_B[:, None]))


def logprobs_at(model: PreTrainedModel, responses: Responses) -> Tensor:
    """The model's log-probabilities where a response token is predicted, (N, V), in nats."""
    logits_BTV = model(input_ids=responses.ids_BT[:, :-1]).logits
    return logits_BTV[responses.is_response_BT].double().log_softmax(-1)


@torch.no_grad()
def extrapolated_kl(student: Path, teacher: Path, base: Path, factor: float, answers: Path) -> float:
    """Mean KL(student, T^factor B^(1 - factor) / Z) in nats over the student's own answers.

    Source: arXiv 2602.12125, the optimum of G-OPD.
    """
    responses = read_responses(answers)
    student_NV, teacher_NV, base_NV = (
        logprobs_at(_load(path), responses) for path in (student, teacher, base)
    )
    target_NV = (factor * teacher_NV + (1 - factor) * base_NV).log_softmax(-1)
    return float((student_NV.exp() * (student_NV - target_NV)).sum(-1).mean())


def gradient_gap(student: Path, teacher: Path, first: Path, cache: Path) -> GradientGap:
    """The gap and its bound at the contexts of a cache's rollouts, expectations over the whole vocabulary."""
    responses = read_responses(cache)
    sampler = _load(first)
    with torch.no_grad():
        teacher_NV, first_NV = (logprobs_at(one, responses) for one in (_load(teacher), sampler))
    model = _load(student).requires_grad_(True)
    now_NV = logprobs_at(model, responses)
    advantage_NV = teacher_NV - now_NV.detach()
    ratio_NV = (now_NV.detach() - first_NV).exp()
    live_P = _gradient(model, (now_NV.detach().exp() * advantage_NV * now_NV).sum(-1).mean())
    offline_P = _gradient(model, (first_NV.exp() * advantage_NV * now_NV).sum(-1).mean())
    chi2 = (first_NV.exp() * (ratio_NV - 1) ** 2).sum(-1).mean()
    spread = (first_NV.exp() * advantage_NV**2).sum(-1).mean().sqrt()
    bound = _largest_gradient(model, responses) * float(spread * chi2.sqrt())
    return GradientGap(float((live_P - offline_P).norm()), bound, float(live_P.norm()), float(chi2))


def _load(path: Path) -> PreTrainedModel:
    return load_model(ModelConfig(path=str(path)), "cpu")


def _gradient(model: PreTrainedModel, value: Tensor) -> Tensor:
    parameters: Sequence[Tensor] = list(model.parameters())
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([one.flatten() for one in found])


def _largest_gradient(model: PreTrainedModel, responses: Responses) -> float:
    """The largest gradient norm at some rollouts' positions: that of their least likely tokens."""
    few = Responses(responses.ids_BT[:FEW_ROLLOUTS], responses.is_response_BT[:FEW_ROLLOUTS])
    now_NV = logprobs_at(model, few)
    least_N = now_NV.min(-1).values
    return max(float(_gradient(model, least).norm()) for least in least_N)
