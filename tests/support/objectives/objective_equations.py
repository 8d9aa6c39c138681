"""Tools for references, and the equations of methods on the sampled token, on full float64 distributions."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from statistics import fmean

import torch
from objective_cases import World
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """What a recipe is held to."""

    loss: Callable[[World, Tensor], Tensor]
    rests_at: str = "teacher"
    """Signal at which its gradient vanishes token by token."""
    moves: str = ""
    """Why it does not rest there, where it does not."""
    is_surrogate: bool = False
    """Its value is a clipped surrogate; only the gradient is the trainer's."""


def sampled(world: World, logprobs_NV: Tensor, n: int) -> Tensor:
    return logprobs_NV[n, world.ids_N[n]]


def means(world: World, loss: Callable[[int], Tensor], rows: list[int] | None = None) -> list[Tensor]:
    """Mean of a token's loss over the trained tokens of each rollout."""
    chosen = range(world.size) if rows is None else rows
    return [torch.stack([loss(n) for n in world.tokens(row)]).mean() for row in chosen]


def batch_mean(world: World, loss: Callable[[int], Tensor], rows: list[int] | None = None) -> Tensor:
    return torch.stack(means(world, loss, rows)).mean()


def token_mean(world: World, loss: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([loss(n) for row in range(world.size) for n in world.tokens(row)]).mean()


def kl(p_V: Tensor, q_V: Tensor) -> Tensor:
    return (p_V.exp() * (p_V - q_V)).sum()


def log_ratio(world: World, student_NV: Tensor, signal: str = "teacher") -> Callable[[int], Tensor]:
    """A_t = sg[log T - log s] on the sampled token."""
    return lambda n: (sampled(world, world.tables[signal], n) - sampled(world, student_NV, n)).detach()


def ratio(world: World, student_NV: Tensor, n: int) -> Tensor:
    """s / s0 on the sampled token, with gradient."""
    return (sampled(world, student_NV, n) - sampled(world, world.tables["rollout_student"], n)).exp()


def ppo(ratio_now: Tensor, advantage: Tensor, low: float, high: float, dual: float | None = None) -> Tensor:
    objective = torch.minimum(ratio_now * advantage, ratio_now.clamp(1 - low, 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = torch.maximum(objective, dual * advantage)
    return -objective


def opd(world: World, student_NV: Tensor, signal: str = "teacher", clip: float = float("inf")) -> Tensor:
    advantage = log_ratio(world, student_NV, signal)
    return batch_mean(world, lambda n: -advantage(n).clamp(-clip, clip) * sampled(world, student_NV, n))


def lightning_opd(world: World, student_NV: Tensor) -> Tensor:
    return opd(world, student_NV, clip=10.0)


def extrapolated(factor: float, baseline: bool) -> Callable[[World, Tensor], Tensor]:
    """A = lambda (log T - log B) - (log s - log B), minus E_s[A] over the vocabulary; weight min(s/s0, 5)."""

    def reference(world: World, student_NV: Tensor) -> Tensor:
        teacher_NV, base_NV = world.tables["teacher"], world.tables["reference"]
        all_NV = (factor * (teacher_NV - base_NV) - (student_NV - base_NV)).detach()

        def loss(n: int) -> Tensor:
            advantage = sampled(world, all_NV, n)
            if baseline:
                advantage = advantage - (student_NV[n].exp() * all_NV[n]).sum().detach()
            weight = ratio(world, student_NV, n).detach().clamp(max=5.0)
            return -weight * advantage * sampled(world, student_NV, n)

        return batch_mean(world, loss)

    return reference


def vopd(world: World, student_NV: Tensor) -> Tensor:
    """A = log T - log s + KL(s || T)."""
    advantage = log_ratio(world, student_NV)

    def loss(n: int) -> Tensor:
        value = kl(student_NV[n], world.tables["teacher"][n]).detach()
        return -(advantage(n) + value) * sampled(world, student_NV, n)

    return batch_mean(world, loss)


def baseline_ratio(world: World, student_NV: Tensor) -> Tensor:
    advantage = log_ratio(world, student_NV)

    def loss(n: int) -> Tensor:
        value = kl(student_NV[n], world.tables["teacher"][n]).detach()
        weight = ratio(world, student_NV, n).detach().clamp(max=2.0)
        return -weight * (advantage(n) + value).clamp(-10, 10) * sampled(world, student_NV, n)

    return batch_mean(world, loss)


def truncated_importance(world: World, student_NV: Tensor) -> Tensor:
    advantage = log_ratio(world, student_NV)

    def loss(n: int) -> Tensor:
        weight = ratio(world, student_NV, n).detach().clamp(max=2.0)
        return -weight * advantage(n).clamp(-10, 10) * sampled(world, student_NV, n)

    return batch_mean(world, loss)


def rollout_score(world: World, row: int) -> float:
    """Mean log T - log s0 of a rollout."""
    gap_NV = world.tables["teacher"] - world.tables["rollout_student"]
    return fmean(float(sampled(world, gap_NV, n)) for n in world.tokens(row))


def uni_opd(world: World, student_NV: Tensor) -> Tensor:
    kept = balanced(world)
    shift: dict[int, float] = {}
    for group in set(world.groups):
        rows = [row for row in kept if world.groups[row] == group]
        right = [row for row in rows if world.rewards[row] >= 0.5]
        wrong = [row for row in rows if world.rewards[row] < 0.5]
        gap = float("inf")
        if right and wrong:
            scores = [fmean(rollout_score(world, r) for r in rows) for rows in (right, wrong)]
            gap = scores[0] - scores[1]
        d = max(0.0, 0.4 - gap)
        shift |= {row: (d / 2 if row in right else -d / 2) for row in rows}
    return uni_opd_loss(world, student_NV, kept, shift)


def balanced(world: World) -> list[int]:
    right = [row for row in range(world.size) if world.rewards[row] >= 0.5]
    wrong = [row for row in range(world.size) if world.rewards[row] < 0.5]
    fewer = min(len(right), len(wrong))
    hashed = sorted(right, key=lambda row: sha256(world.names[row].encode()).hexdigest())
    return sorted(hashed[:fewer] + wrong)


def uni_opd_mask(world: World, student_NV: Tensor) -> Tensor:
    """Groups of two: dropping one would lose an outcome, so all stay."""
    return uni_opd_loss(world, student_NV, list(range(world.size)), {})


def uni_opd_loss(world: World, student_NV: Tensor, kept: list[int], shift: dict[int, float]) -> Tensor:
    advantage = log_ratio(world, student_NV)

    def loss(n: int) -> Tensor:
        is_near = advantage(n).abs() < 10
        moved = advantage(n) + shift.get(int(world.row_N[n]), 0.0)
        return is_near * ppo(ratio(world, student_NV, n), moved, 0.2, 0.28)

    return batch_mean(world, loss, kept)
