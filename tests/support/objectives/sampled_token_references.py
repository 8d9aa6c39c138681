"""References of controls, horizons and of what else matches sampled tokens, from their equations."""

from hashlib import sha256
from math import ceil

import numpy as np
import torch
from objective_cases import CHUNKS, CONFIDENCES, World
from objective_equations import (
    Reference,
    batch_mean,
    kl,
    log_ratio,
    opd,
    ppo,
    ratio,
    sampled,
    token_mean,
)
from torch import Tensor


def constant(world: World, student_NV: Tensor) -> Tensor:
    """PPO's surrogate of an advantage of -1 at every token."""
    minus_one = torch.tensor(-1.0, dtype=torch.float64)
    return batch_mean(world, lambda n: ppo(ratio(world, student_NV, n), minus_one, 0.2, 0.28))


def shuffled(world: World, student_NV: Tensor) -> Tensor:
    """-A_pi(t) log s(a_t), pi a permutation of the rollout's trained tokens."""
    advantage = log_ratio(world, student_NV)
    credit: dict[int, Tensor] = {}
    for row in range(world.size):
        tokens = world.tokens(row)
        seed = int.from_bytes(sha256(f"0/{world.names[row]}".encode()).digest()[:8], "little")
        keys = np.random.default_rng(seed).random(max(world.lengths))
        dealt = sorted(tokens, key=lambda n: keys[int(world.index_N[n])])
        credit |= {n: advantage(other) for n, other in zip(tokens, dealt, strict=True)}
    return batch_mean(world, lambda n: -credit[n].clamp(-10, 10) * sampled(world, student_NV, n))


def horizon(share: float):
    """Lightning OPD on the first ceil(share n) of the n tokens of a rollout, divided by their number."""

    def reference(world: World, student_NV: Tensor) -> Tensor:
        advantage = log_ratio(world, student_NV)
        rows = []
        for row in range(world.size):
            tokens = world.tokens(row)
            first = tokens[: ceil(share * len(tokens))]
            losses = [-advantage(n).clamp(-10, 10) * sampled(world, student_NV, n) for n in first]
            rows.append(torch.stack(losses).mean())
        return torch.stack(rows).mean()

    return reference


def erpd(world: World, student_NV: Tensor) -> Tensor:
    """PPO's surrogate of A = log E - log B."""
    gap_NV = world.tables["teacher"] - world.tables["reference"]
    return batch_mean(world, lambda n: ppo(ratio(world, student_NV, n), sampled(world, gap_NV, n), 0.2, 0.2))


def brts(world: World, student_NV: Tensor) -> Tensor:
    """sum_v s_v sg[log s_v - log T_v] over the student's rows, plus 0.05 of it over the teacher's.

    Each prompt of this world has one answer of the teacher, so that the choice among them keeps all.
    """
    gap_NV = (student_NV - world.tables["teacher"]).detach()

    def term(origin: str) -> Tensor:
        rows = [row for row in range(world.size) if world.origins[row] == origin]
        return batch_mean(world, lambda n: (student_NV[n].exp() * gap_NV[n]).sum(), rows)

    return term("student") + 0.05 * term("teacher")


def lspd(world: World, student_NV: Tensor) -> Tensor:
    """min(s / s0, 2) h(log s - log T), h(g) = g^2 / 2 within 1 nat, |g| - 1/2 beyond."""

    def loss(n: int) -> Tensor:
        gap = sampled(world, student_NV, n) - sampled(world, world.tables["teacher"], n)
        value = gap**2 / 2 if gap.abs() <= 1 else gap.abs() - 0.5
        return ratio(world, student_NV, n).detach().clamp(max=2.0) * value

    return batch_mean(world, loss)


def vision_opd(world: World, student_NV: Tensor) -> Tensor:
    """sg[min(s / s0, 2)] JSD(T, s), mean over tokens; the support is the vocabulary here."""

    def loss(n: int) -> Tensor:
        s_V, t_V = student_NV[n], world.tables["privileged"][n]
        m_V = ((s_V.exp() + t_V.exp()) / 2).log()
        value = (kl(s_V, m_V) + kl(t_V, m_V)) / 2
        return ratio(world, student_NV, n).detach().clamp(max=2.0) * value

    return token_mean(world, loss)


def pipo(world: World, student_NV: Tensor) -> Tensor:
    """KL(s || T), mean over tokens; the union of the top-k is the vocabulary here."""
    return token_mean(world, lambda n: kl(student_NV[n], world.tables["teacher"][n]))


def mad_opd(world: World, student_NV: Tensor) -> Tensor:
    """sum_k w_k JSD(T_k, s), w = softmax(confidence / 100) over the teachers of each rollout."""
    names = {"teacher": "confidence", "second_teacher": "second_confidence"}
    total = []
    for row in range(world.size):
        stated = torch.tensor([CONFIDENCES[name][row] / 100 for name in names.values()], dtype=torch.float64)
        share = dict(zip(names, stated.softmax(0), strict=True))

        def loss(n: int, share: dict[str, Tensor] = share) -> Tensor:
            s_V, found = student_NV[n], []
            for name in names:
                t_V = world.tables[name][n]
                m_V = ((s_V.exp() + t_V.exp()) / 2).log()
                found.append(share[name] * (kl(s_V, m_V) + kl(t_V, m_V)) / 2)
            return torch.stack(found).sum()

        total.append(torch.stack([loss(n) for n in world.tokens(row)]).mean())
    return torch.stack(total).mean()


def omniopd(world: World, student_NV: Tensor) -> Tensor:
    """-(kappa + q) / (2 + 1) log s in a chunk of two continuations, and KL(B || s) elsewhere, 0.1 of it."""
    rows = []
    for row in range(world.size):
        place = {int(world.index_N[n]): n for n in world.tokens(row)}
        target = {}
        for start, end, kappa in CHUNKS[row]:
            inside = [place[t] for t in range(start, end) if t in place]
            own = torch.stack([sampled(world, student_NV, n) for n in inside]).mean().exp()
            target |= {n: ((kappa + own) / 3).detach() for n in inside}
        losses = [
            -target[n] * sampled(world, student_NV, n)
            if n in target
            else 0.1 * kl(world.tables["reference"][n], student_NV[n])
            for n in world.tokens(row)
        ]
        rows.append(torch.stack(losses).mean())
    return torch.stack(rows).mean()


def unmasking(world: World, student_NV: Tensor) -> Tensor:
    """KL(s || T) over incorrect rollouts, a mean over them."""
    wrong = [row for row in range(world.size) if world.rewards[row] < 0.5]
    return batch_mean(world, lambda n: kl(student_NV[n], world.tables["teacher"][n]), wrong)


def vpd_teacher(world: World, student_NV: Tensor) -> Tensor:
    """-E+ log sigmoid(rho - delta) - E- log sigmoid(delta - rho), rho = 0.1 log(q / s0) of the response."""
    gap_NV = student_NV - world.tables["rollout_student"]
    rho = [
        0.1 * torch.stack([sampled(world, gap_NV, n) for n in world.tokens(r)]).sum()
        for r in range(world.size)
    ]
    right = [rho[r] for r in range(world.size) if world.rewards[r] >= 0.5]
    wrong = [rho[r] for r in range(world.size) if world.rewards[r] < 0.5]
    delta = ((torch.stack(right).mean() + torch.stack(wrong).mean()) / 2).detach()
    of_right = torch.stack([-torch.sigmoid(one - delta).log() for one in right]).mean()
    return of_right + torch.stack([-torch.sigmoid(delta - one).log() for one in wrong]).mean()


def atesd(world: World, student_NV: Tensor) -> Tensor:
    """KL(T || s) of the exposure that training begins with, the middle one."""
    return batch_mean(world, lambda n: kl(world.tables["exposure_2"][n], student_NV[n]))


SAMPLED_TOKEN = {
    "atesd": Reference(atesd, rests_at="exposure_2"),
    "vpd_teacher": Reference(vpd_teacher, moves="outcomes"),
    "unmasking": Reference(unmasking),
    "omniopd": Reference(omniopd, moves="likelihood of chunks, none of it negative"),
    "mad_opd": Reference(mad_opd, moves="rests between two teachers"),
    "vision_opd": Reference(vision_opd, rests_at="privileged"),
    "pipo": Reference(pipo),
    "semi_opd": Reference(opd),
    "control_constant": Reference(constant, moves="no teacher", is_surrogate=True),
    "control_shuffled": Reference(shuffled),
    "horizon": Reference(horizon(0.3)),
    "topd": Reference(horizon(0.1)),
    "erpd": Reference(erpd, moves="the student is not in the advantage", is_surrogate=True),
    "brts": Reference(brts),
    "lspd": Reference(lspd),
}
