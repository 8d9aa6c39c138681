"""How far a mean of sampled gradients is from the gradient of the whole vocabulary, by estimator, exactly.

    python benchmarks/residual.py                  # V = 200, K = 8, drift 0.5, 256 draws; a few seconds
    python benchmarks/residual.py --drift 1.0 --top-k 32 --temperature 0.8

One position. The student at rollout samples; the student now has moved away from it by `--drift` nats of
noise on every logit, the teacher by `--gap`. A line is the root mean square error of a mean over `--draws`
draws against the gradient of KL(student now || teacher) by the logits, and the bias in it, both worked out
over all tokens; means over `--worlds`. Nothing is drawn, so the figures have no noise.
"""

import argparse
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch, StudentTokens
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs
from lightopd.schemas.objectives.objective import ObjectiveConfig

# V = vocabulary, one rollout of one token for each of its tokens; K = the teacher's most likely tokens

LOG_RATIO = {"kind": "log_ratio", "clip": None}
UNCAPPED = {"kind": "ratio", "cap": 1e30}
ESTIMATORS = {
    "plain": {"target": LOG_RATIO},
    "ratio": {"target": LOG_RATIO, "token_weights": [UNCAPPED]},
    "baseline and ratio": {"target": LOG_RATIO, "baseline": "expected", "token_weights": [UNCAPPED]},
    "top-k + tail": {"target": {"kind": "divergence"}},
    "residual": {"target": {"kind": "divergence", "residual": {"eta": 1.0, "cap": None, "clip": None}}},
    "residual, capped at 2": {
        "target": {"kind": "divergence", "residual": {"eta": 1.0, "cap": 2.0, "clip": None}}
    },
}


@dataclass(frozen=True, slots=True)
class World:
    """Log-probabilities [V], float64."""

    student_V: Tensor
    rollout_V: Tensor
    behavior_V: Tensor
    """The student at rollout at the temperature it samples with."""
    teacher_V: Tensor


def make_world(seed: int, size: int, drift: float, gap: float, temperature: float = 1.0) -> World:
    """Everyone at one position."""
    random = torch.Generator().manual_seed(seed)
    noise_3V = torch.randn((3, size), generator=random, dtype=torch.float64)
    rollout_V = (2 * noise_3V[0]).log_softmax(0)
    return World(
        (rollout_V + drift * noise_3V[1]).log_softmax(0),
        rollout_V,
        (rollout_V / temperature).log_softmax(0),
        (rollout_V + gap * noise_3V[2]).log_softmax(0),
    )


def gradients(config: ObjectiveConfig, world: World, top_k: int) -> Tensor:
    """Row a is the gradient by the logits of the loss of token a alone, [V, V]."""
    size = len(world.student_V)
    every = torch.arange(size)
    logits_VV = world.student_V.repeat(size, 1).requires_grad_()
    logprobs_VV = logits_VV.log_softmax(1)
    signal = _signal(world.teacher_V, top_k)
    ids_VK = signal.topk_ids_NK
    student = StudentTokens(
        logprobs_VV.diagonal(),
        torch.zeros(size, dtype=torch.float64),
        {name: logprobs_VV.gather(1, ids_VK) for name in needs(config).supports},
        {name: _outside(logprobs_VV, ids_VK) for name in needs(config).supports},
    )
    batch = RolloutBatch(
        ids_N=every,
        row_N=every,
        index_N=torch.zeros_like(every),
        loss_mask_N=torch.ones(size, dtype=torch.bool),
        turns_N=torch.zeros_like(every),
        ref_logprobs_N=world.rollout_V,
        signals={"teacher": signal},
        lengths_R=torch.ones_like(every),
        rewards_R=torch.zeros(size),
        is_truncated_R=torch.zeros(size, dtype=torch.bool),
        groups_R=every,
        domains=(None,) * size,
        rollout_ids=tuple(map(str, range(size))),
        totals=BatchTotals(1, 1),
        longest=1,
        num_turns=1,
        behavior_logprobs_N=world.behavior_V,
    )
    (gradient_VV,) = torch.autograd.grad(compute_loss(config, batch, student).value, logits_VV)
    return gradient_VV


def error(config: ObjectiveConfig, world: World, top_k: int, draws: int) -> tuple[float, float]:
    """Root mean square error of a mean over draws, and its bias."""
    rows_VV, behavior_V = gradients(config, world, top_k), world.behavior_V.exp()
    mean_V = behavior_V @ rows_VV
    variance = behavior_V @ (rows_VV - mean_V).square().sum(1)
    bias = (mean_V - exact(world)).norm()
    return float((bias.square() + variance / draws).sqrt()), float(bias)


def exact(world: World) -> Tensor:
    """Gradient of KL(student || teacher) by the logits, [V]: s (g - E_s g), g = log s - log T."""
    student_V, gap_V = world.student_V.exp(), world.student_V - world.teacher_V
    return student_V * (gap_V - student_V @ gap_V)


def rows(worlds: int, draws: int, top_k: int, **options: float) -> list[dict[str, object]]:
    """One row for each estimator, means over worlds."""
    found: list[dict[str, object]] = []
    for name, parts in ESTIMATORS.items():
        config = ObjectiveConfig.model_validate(parts)
        pairs = [error(config, make_world(seed, **options), top_k, draws) for seed in range(worlds)]
        rmse, bias = (sum(side) / worlds for side in zip(*pairs, strict=True))
        found.append({"estimator": name, "rmse": round(rmse, 4), "bias": round(bias, 4)})
    return found


def _signal(teacher_V: Tensor, top_k: int) -> SignalBatch:
    teacher_VV = teacher_V.repeat(len(teacher_V), 1)
    topk_VK, ids_VK = teacher_VV.topk(top_k, dim=1)
    return SignalBatch(teacher_V, ids_VK, topk_VK, _outside(teacher_VV, ids_VK))


def _outside(logprobs_VV: Tensor, ids_VK: Tensor) -> Tensor:
    return logprobs_VV.scatter(1, ids_VK, -torch.inf).logsumexp(1)


def main() -> None:
    """Print a JSON line for each estimator."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=200, help="tokens of the vocabulary")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--drift", type=float, default=0.5, help="nats, of the student now")
    parser.add_argument("--gap", type=float, default=0.5, help="nats, of the teacher")
    parser.add_argument("--temperature", type=float, default=1.0, help="that the rollouts were drawn at")
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--worlds", type=int, default=16)
    asked = vars(parser.parse_args())
    for row in rows(**asked):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
