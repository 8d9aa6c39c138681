"""A student in training mode that says what it says in evaluation mode, every time.

The loss compares the student with log-probabilities that were measured in evaluation mode: dropout, jitter of
routers, dropped layers, noise in embeddings and statistics of a batch would all be read as drift.
"""

# B = sequences, T = their length, D = hidden size

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightopd.errors import TrainingError
from lightopd.models.head import last_hidden

log = logging.getLogger(__name__)

PROBE_SHAPE = (2, 16)
"""Sequences and tokens that a student is tried on."""
TOLERANCE = 1e-4
"""Relative difference that rounding explains."""


def prepare_student(student: PreTrainedModel, *, gradient_checkpointing: bool) -> PreTrainedModel:
    """Put a loaded student into the state it is trained in.

    That is training mode with every dropout at zero. Where it still draws random numbers or says something
    else than in evaluation mode, the student stays in evaluation mode, but for the layers that recompute.

    Raises:
        TrainingError: neither mode gives gradients of what evaluation mode says.
    """
    student.eval()
    expected_BTD = _probe(student)
    student.train()
    _switch_off_dropout(student)
    if gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if _is_as(student, expected_BTD):
        return student
    trained = _reached(student)
    student.eval()
    recomputed = [module for module in student.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in recomputed if gradient_checkpointing else ():
        module.training = True  # of this module alone: recomputing asks for it
    log.info("%s draws random numbers in training mode and stays in evaluation mode", type(student).__name__)
    if gradient_checkpointing and not recomputed:
        log.warning("gradient_checkpointing has no effect: the student recomputes in training mode only")
    if not _is_as(student, expected_BTD) or _reached(student) < trained:
        raise TrainingError(
            f"{type(student).__name__} says something else in training than in evaluation mode, beyond "
            "dropout, and evaluation mode has no gradients; set what its config.json calls jitter, noise or "
            "layerdrop to 0, or train another student"
        )
    return student


def _switch_off_dropout(student: PreTrainedModel) -> None:
    for module in student.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _is_as(student: PreTrainedModel, expected_BTD: Tensor) -> bool:
    """Whether a pass draws no random number and gives what is expected."""
    before = _generators(student)
    with _buffers_kept(student):
        found_BTD = _probe(student)
    drew = _generators(student) != before
    difference = float((found_BTD - expected_BTD).abs().max())
    return not drew and difference <= TOLERANCE * float(expected_BTD.abs().max())


@contextmanager
def _buffers_kept(student: PreTrainedModel) -> Iterator[None]:
    """Leave buffers, such as statistics of a batch, as they were."""
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    yield
    for name, buffer in student.named_buffers():
        buffer.copy_(before[name])


@contextmanager
def _plain_attention(student: PreTrainedModel) -> Iterator[None]:
    """Flash attention knows neither the host nor float32, in which a student is tried."""
    implementation = student.config._attn_implementation or ""
    if "flash" not in implementation:
        yield
        return
    student.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        student.set_attn_implementation(implementation)


def _probe(student: PreTrainedModel) -> Tensor:
    with torch.no_grad(), _plain_attention(student):
        return last_hidden(student, input_ids=_ids(student), use_cache=False)


def _reached(student: PreTrainedModel) -> set[str]:
    """Names of the parameters that a loss on the last hidden states has a gradient for."""
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    with _buffers_kept(student), _plain_attention(student):
        loss = last_hidden(student, input_ids=_ids(student), use_cache=False).float().square().sum()
        found = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _ids(student: PreTrainedModel) -> Tensor:
    width = student.get_input_embeddings().weight.shape[0]
    device = next(student.parameters()).device
    count = PROBE_SHAPE[0] * PROBE_SHAPE[1]
    return (torch.arange(count, device=device) * 7919 + 1).remainder(width).view(PROBE_SHAPE)


def _generators(student: PreTrainedModel) -> tuple[Any, ...]:
    """Where every generator stands that a model may draw from."""
    device = next(student.parameters()).device
    of_device = (torch.cuda.get_rng_state(device).tolist(),) if device.type == "cuda" else ()
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tobytes(), numpy[2], *of_device
