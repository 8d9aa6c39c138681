"""What hidden states would cost and lose, on a scored sample: the choice `--keep hidden`."""

# N = response tokens, D = hidden size, V = vocabulary

from collections.abc import Iterator, Sequence

import torch
from pydantic import JsonValue

from lightopd.cache.signals.channels import Channels, HiddenColumns, channels_from_sums
from lightopd.cache.signals.hidden import hidden_states
from lightopd.engines.base import Engine, KeepsHiddenStates
from lightopd.models.head import Head
from lightopd.pipelines.shared.costs.choices import PRECISION
from lightopd.pipelines.shared.sequences import num_response_tokens
from lightopd.schemas.records import RolloutSignal
from lightopd.schemas.records import Sequence as TokenSequence

MEASURED = 16
"""Responses that tell the loss."""
ROWS = 64
"""Positions whose whole distributions are held at once."""
SETTINGS = "--keep hidden"


def hidden_size(engine: Engine) -> int | None:
    """D of the engine's model; None where it gives no hidden states."""
    return engine.own_head().weight_VD.shape[1] if isinstance(engine, KeepsHiddenStates) else None


def hidden_bytes(size: int, form: str) -> int:
    """Bytes a token of a hidden state: int8 with a scale, or bfloat16; they compress little."""
    return size + 2 if form == "int8" else 2 * size


def hidden_row(sampled: dict[str, JsonValue], size: int, lost: float | None) -> dict[str, JsonValue]:
    """A row beside those of the choices, from that of the sampled token alone; nothing lies in a tail."""
    more = hidden_bytes(size, "int8")
    sizes = {
        name: round(float(str(sampled[name])) + more, 1) for name in ("bytes_float16", f"bytes_{PRECISION}")
    }
    return {**sampled, "choice": "hidden", **sizes, "kl_uniform": lost, "kl_shaped": lost}


def hidden_loss(
    engine: Engine, calibration: Sequence[TokenSequence], measured: Sequence[TokenSequence]
) -> float | None:
    """KL(what bfloat16 states rebuild || what int8 ones do), nats a token; None where it cannot be told.

    Args:
        engine: the teacher's.
        calibration: responses that the statistics of int8 are made from; none: nothing is told.
        measured: others.
    """
    measured = measured[:MEASURED]
    tokens = num_response_tokens(measured)
    if not isinstance(engine, KeepsHiddenStates) or not calibration or not tokens:
        return None
    channels = channels_from_sums(*engine.sum_hidden(calibration), num_response_tokens(calibration))
    exact, rounded = (engine.score_hidden(measured, 0, 0.0, form) for form in (None, channels))
    head = engine.own_head()
    parts = (
        _kl_sum(head, _states(one, None, device), _states(other, channels, device))
        for device in [head.weight_VD.device]
        for one, other in zip(exact, rounded, strict=True)
    )
    return float(f"{sum(parts) / tokens:.2g}")


def _states(scores: RolloutSignal, channels: Channels | None, device: torch.device) -> torch.Tensor:
    assert scores.hidden is not None
    return hidden_states(HiddenColumns(scores.hidden, scores.hidden_scales, channels), device)


@torch.no_grad()
def _kl_sum(head: Head, exact_ND: torch.Tensor, rounded_ND: torch.Tensor) -> float:
    def logprobs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for pair in zip(torch.split(exact_ND, ROWS), torch.split(rounded_ND, ROWS), strict=True):
            exact_NV, rounded_NV = (head.logits(part_ND).double().log_softmax(1) for part_ND in pair)
            yield exact_NV, rounded_NV

    return sum(float((one_NV.exp() * (one_NV - other_NV)).sum()) for one_NV, other_NV in logprobs())
