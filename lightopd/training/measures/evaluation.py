"""What an evaluation measures: accuracy over k answers, and divergence from a teacher.

N = response positions of a batch, D = hidden size, V = vocabulary; nats per token throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightopd.engines.hf.batching import plan_batches
from lightopd.engines.hf.hidden_states import num_inputs, plain_hidden
from lightopd.errors import InputError
from lightopd.models.head import head_of
from lightopd.models.load import LoadedModel, choose_device, context_length_of, load_model
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.records import Sequence as TokenSequence

CHUNK_POSITIONS = 256
"""Positions whose full distributions are held at a time."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Rewards of k answers to each prompt."""

    avg_at_k: float
    """Mean reward over prompts and answers."""
    pass_at_k: float
    """Share of prompts with at least one answer of reward 1."""
    standard_error: float
    """Of avg_at_k, over prompts."""


def accuracy(prompt_ids: Sequence[str], rewards: Sequence[float | None]) -> Accuracy | None:
    """Accuracy over the rows that have a reward; None when none has.

    `prompt_ids` names the prompt of each answer; prompts count equally, however many answers they have.
    """
    by_prompt: dict[str, list[float]] = {}
    for prompt_id, reward in zip(prompt_ids, rewards, strict=True):
        if reward is not None:
            by_prompt.setdefault(prompt_id, []).append(reward)
    if not by_prompt:
        return None
    means = np.array([np.mean(values) for values in by_prompt.values()])
    passed = np.array([max(values) >= 1.0 for values in by_prompt.values()])
    error = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else 0.0
    return Accuracy(float(means.mean()), float(passed.mean()), error)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Full-vocabulary divergences over the response positions of some sequences."""

    reverse_kl_nats: float
    """KL(student || teacher), mean over positions."""
    forward_kl_nats: float
    """KL(teacher || student), mean over positions."""
    num_tokens: int
    outside_mass: float | None = None
    """Mean probability of the wider model on ids that the other has not; None where both are as wide."""


@torch.no_grad()
def divergence(
    student: ModelConfig, teacher: ModelConfig, sequences: Sequence[TokenSequence], engine: HfEngine
) -> Divergence:
    """KL between two models over the whole vocabulary at every response position.

    Output layers are padded to other widths in models of one family. Where the widths differ, both
    distributions are taken over the ids that both have, each normalised there, and what the wider model
    gives to the other ids is measured: with an outcome that one model cannot have, one KL is infinite.

    Raises:
        InputError: no sequence has a response.
    """
    device = choose_device(engine.device)
    models = [_loaded(model, device) for model in (student, teacher)]
    widths = [model.head.weight_VD.shape[0] for model in models]
    shared = min(widths)
    reverse = forward = outside = 0.0
    count = 0
    answered = [sequence for sequence in sequences if len(sequence.response_ids)]
    for batch in plan_batches([num_inputs(sequence) for sequence in answered], engine.batch_tokens):
        hidden = [plain_hidden(model, [answered[index] for index in batch]) for model in models]
        for start in range(0, len(hidden[0]), CHUNK_POSITIONS):
            logits = [
                model.head.logits(h_ND[start : start + CHUNK_POSITIONS])
                for model, h_ND in zip(models, hidden, strict=True)
            ]
            outside += sum(_mass_beyond(whole_NV, shared) for whole_NV in logits)
            s_NV, t_NV = (whole_NV[:, :shared].log_softmax(-1) for whole_NV in logits)
            reverse += float((s_NV.exp() * (s_NV - t_NV)).sum(dtype=torch.float64))
            forward += float((t_NV.exp() * (t_NV - s_NV)).sum(dtype=torch.float64))
            count += len(s_NV)
    if count == 0:
        raise InputError("no response tokens to measure KL on; give prompts that the model answers")
    return Divergence(
        reverse / count, forward / count, count, None if len(set(widths)) == 1 else outside / count
    )


def _mass_beyond(logits_NV: torch.Tensor, limit: int) -> float:
    """Probability of the ids from `limit` on, summed over positions."""
    if logits_NV.shape[-1] == limit:
        return 0.0
    return float(logits_NV.softmax(-1)[:, limit:].sum(dtype=torch.float64))


def _loaded(model: ModelConfig, device: torch.device) -> LoadedModel:
    loaded = load_model(model, device)
    return LoadedModel(loaded, head_of(loaded), device, context_length_of(loaded))
