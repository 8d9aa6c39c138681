"""Every recipe's loss straight from its equation, on full float64 distributions, in plain loops.

Each function takes the world and the student's log-probabilities [N, V] and returns a scalar with gradient.
Methods whose paper writes a clipped surrogate return that surrogate; their value differs from the trainer's
-A log s, their gradient does not (`is_surrogate`).
"""

from collections.abc import Callable
from statistics import fmean, stdev

import torch
from objective_cases import World
from objective_equations import (
    Reference,
    baseline_ratio,
    batch_mean,
    extrapolated,
    kl,
    lightning_opd,
    log_ratio,
    means,
    opd,
    ppo,
    ratio,
    sampled,
    token_mean,
    truncated_importance,
    uni_opd,
    uni_opd_mask,
    vopd,
)
from sampled_token_references import SAMPLED_TOKEN
from torch import Tensor


def scope(sign: float, *, code: bool) -> Callable[[World, Tensor], Tensor]:
    """u ~ PPL_s0^(1/tau) over correct, v ~ PPL_T^(-1/tau) over incorrect rollouts of a group, mean one.

    Sums over tokens, then a mean over rollouts; in the code the likelihood is a mean over the tokens of
    correct rollouts, and the distillation one over all tokens.
    """

    def reference(world: World, student_NV: Tensor) -> Tensor:
        advantage = log_ratio(world, student_NV)
        tokens = [len(world.tokens(row)) for row in range(world.size)]
        correct = sum(tokens[row] for row in range(world.size) if world.rewards[row] >= 0.5)
        over = (correct, sum(tokens)) if code else (world.size, world.size)
        total = torch.zeros((), dtype=torch.float64)
        for group in set(world.groups):
            members = [row for row in range(world.size) if world.groups[row] == group]
            right = [row for row in members if world.rewards[row] >= 0.5]
            wrong = [row for row in members if world.rewards[row] < 0.5]
            for row in right:
                scale = mean_one([perplexity(world, "rollout_student", r) ** sign for r in right])
                nll = -sum(sampled(world, student_NV, n) for n in world.tokens(row))
                total = total + scale[right.index(row)] * nll / over[0]
            for row in wrong:
                scale = mean_one([1 / perplexity(world, "teacher", r) for r in wrong])
                opd_sum = -sum(advantage(n) * sampled(world, student_NV, n) for n in world.tokens(row))
                total = total + scale[wrong.index(row)] * opd_sum / over[1]
        return total

    return reference


def perplexity(world: World, signal: str, row: int) -> float:
    logprobs = [sampled(world, world.tables[signal], n) for n in world.tokens(row)]
    return float(torch.stack(logprobs).mean().neg().exp())


def mean_one(values: list[float]) -> list[float]:
    return [value / fmean(values) for value in values]


def full_divergence(
    name: str, signal: str = "teacher", rows: str | None = None
) -> Callable[[World, Tensor], Tensor]:
    def reference(world: World, student_NV: Tensor) -> Tensor:
        chosen = [row for row in range(world.size) if rows in (None, world.origins[row])]
        table_NV = world.tables[signal]
        return batch_mean(world, lambda n: DIVERGENCES[name](table_NV[n], student_NV[n]), chosen)

    return reference


def jsd(t_V: Tensor, s_V: Tensor, beta: float = 0.5) -> Tensor:
    m_V = (beta * t_V.exp() + (1 - beta) * s_V.exp()).log()
    return beta * kl(t_V, m_V) + (1 - beta) * kl(s_V, m_V)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda t, s: kl(t, s),
    "reverse_kl": lambda t, s: kl(s, t),
    "jsd": jsd,
    "skew_kl": lambda t, s: kl(t, (0.1 * t.exp() + 0.9 * s.exp()).log()),
    "skew_reverse_kl": lambda t, s: kl(s, (0.1 * s.exp() + 0.9 * t.exp()).log()),
    "tv": lambda t, s: (t.exp() - s.exp()).abs().sum() / 2,
    "alpha": lambda t, s: ((t.exp() ** 0.5 * s.exp() ** 0.5).sum() - 1) / (0.5 * (0.5 - 1)),
    "mix": lambda t, s: 0.3 * kl(s, t) + 0.7 * kl(t, s),
}


def tcod(world: World, student_NV: Tensor) -> Tensor:
    """At the first step k = 1: turn 0 alone."""
    advantage = log_ratio(world, student_NV)
    total = []
    for row in range(world.size):
        shown = [n for n in world.tokens(row) if world.turns_N[n] < 1]
        total.append(torch.stack([-advantage(n) * sampled(world, student_NV, n) for n in shown]).mean())
    return torch.stack(total).mean()


def opsd_code(world: World, student_NV: Tensor) -> Tensor:
    """JSD of both distributions divided by 1.1 in the logits, mean over tokens."""
    table_NV = world.tables["privileged"]
    return token_mean(world, lambda n: jsd(*tempered_pair(table_NV[n], student_NV[n], 1.1)))


def tempered_pair(t_V: Tensor, s_V: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (t_V / temperature).log_softmax(-1), (s_V / temperature).log_softmax(-1)


def renio(world: World, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Element-clipped forward KL times sg[w]: pivots l >= 0.8 of l = min(log s - log T, 2.5)."""
    table_NV = world.tables["teacher"]
    raw = []
    for row in range(world.size):
        gaps = [
            min(float(sampled(world, student_NV.detach(), n) - sampled(world, table_NV, n)), 2.5)
            for n in world.tokens(row)
        ]
        pivots = [gap for gap in gaps if gap >= 0.8]
        raw.append(float(torch.tensor(fmean(pivots), dtype=torch.float64).exp()) if pivots else 1.0)
    weights = [min(weight / fmean(raw), 10.0) for weight in raw]

    def loss(n: int) -> Tensor:
        t_V, s_V = tempered_pair(table_NV[n], student_NV[n], temperature)
        return (t_V.exp() * (t_V - s_V)).clamp(0, 0.05).sum()

    return torch.stack([w * value for w, value in zip(weights, means(world, loss), strict=True)]).mean()


def many_faces(world: World, student_NV: Tensor) -> Tensor:
    """sum over K of s sg[log s - log T]; K = V here, see `test_objectives_divergences` for less."""
    table_NV = world.tables["teacher"]
    return batch_mean(world, lambda n: (student_NV[n].exp() * (student_NV[n] - table_NV[n]).detach()).sum())


def extrapolation_cliff(world: World, student_NV: Tensor) -> Tensor:
    return extrapolated(1.2, baseline=False)(world, student_NV)


def prune_opd(world: World, student_NV: Tensor) -> Tensor:
    """top_k 3, threshold 0.9, drop 0.2, as the test sets them: the rollouts here are short."""
    advantage = log_ratio(world, student_NV)
    weight: dict[int, float] = {}
    for row in range(world.size):
        bad = 0
        for n in world.tokens(row):
            own = set(world.tables["rollout_student"][n].topk(3).indices.tolist())
            other = set(world.tables["teacher"][n].topk(3).indices.tolist())
            bad += len(own & other) / 3 < 0.9
            weight[n] = min(max(1 - 0.2 * bad, 0.0), 1.0)
    return batch_mean(world, lambda n: -weight[n] * advantage(n) * sampled(world, student_NV, n))


def tip(score: str) -> Callable[[World, Tensor], Tensor]:
    def reference(world: World, student_NV: Tensor) -> Tensor:
        table_NV = world.tables["teacher"]
        total = []
        for row in range(world.size):
            tokens = world.tokens(row)
            entropy = [float(-(student_NV[n].exp() * student_NV[n]).sum().detach()) for n in tokens]
            wrong = [float(kl(student_NV[n], table_NV[n]).detach()) for n in tokens]
            h, d = scaled(entropy), scaled(wrong)
            useful = [a + b - a * b if score == "soft_or" else a for a, b in zip(h, d, strict=True)]
            number = -(-len(tokens) // 2)
            best = sorted(range(len(tokens)), key=lambda place: -useful[place])[:number]
            total.append(torch.stack([kl(student_NV[tokens[p]], table_NV[tokens[p]]) for p in best]).mean())
        return torch.stack(total).mean()

    return reference


def scaled(values: list[float]) -> list[float]:
    """Min-max scaling after cutting at the 0.98 quantile, as torch.quantile interpolates it."""
    high = float(torch.tensor(values, dtype=torch.float64).quantile(0.98))
    low = min(values)
    return [(min(value, high) - low) / (high - low) if high > low else 0.0 for value in values]


def group_advantage(world: World) -> list[float]:
    """(R - mean) / (std + 1e-6), unbiased deviation."""
    result = []
    for row in range(world.size):
        own = [world.rewards[r] for r in range(world.size) if world.groups[r] == world.groups[row]]
        result.append((world.rewards[row] - fmean(own)) / (stdev(own) + 1e-6))
    return result


def sod(world: World, student_NV: Tensor) -> Tensor:
    """A = A_group + w_k (log T - log s), w_k the product over steps of the drift's ratio, PPO clip."""
    gap_NV = world.tables["rollout_student"] - world.tables["teacher"]
    advantage, reward = log_ratio(world, student_NV), group_advantage(world)
    scale: dict[int, float] = {}
    for row in range(world.size):
        turns = sorted({int(world.turns_N[n]) for n in world.tokens(row)})
        own = {turn: [n for n in world.tokens(row) if world.turns_N[n] == turn] for turn in turns}
        drift = [fmean(abs(float(sampled(world, gap_NV, n))) for n in own[turn]) for turn in turns]
        product = 1.0
        for place, turn in enumerate(turns):
            if place:
                product *= (drift[place - 1] + 1e-6) / (drift[place] + 1e-6)
            scale |= {n: min(product, 1.2) for n in own[turn]}

    def loss(n: int) -> Tensor:
        total = reward[int(world.row_N[n])] + scale[n] * advantage(n)
        return ppo(ratio(world, student_NV, n), total, 0.2, 0.28, 3.0)

    return token_mean(world, loss)


def dgrpo(world: World, student_NV: Tensor) -> Tensor:
    """GRPO's clipped surrogate plus 0.1 times the exact reverse KL."""
    reward = group_advantage(world)

    def loss(n: int) -> Tensor:
        advantage = torch.tensor(reward[int(world.row_N[n])], dtype=torch.float64)
        surrogate = ppo(ratio(world, student_NV, n), advantage, 0.2, 0.2)
        return surrogate + 0.1 * kl(student_NV[n], world.tables["teacher"][n])

    return batch_mean(world, loss)


def dp_opd(world: World, student_NV: Tensor) -> Tensor:
    """JSD summed over a rollout's tokens, mean over rollouts; clip and noise act on its gradients."""
    table_NV = world.tables["teacher"]
    sums = [
        torch.stack([jsd(table_NV[n], student_NV[n]) for n in world.tokens(row)]).sum()
        for row in range(world.size)
    ]
    return torch.stack(sums).mean()


def zppo(world: World, student_NV: Tensor) -> Tensor:
    """GRPO's clipped surrogate alone."""
    reward = group_advantage(world)

    def loss(n: int) -> Tensor:
        advantage = torch.tensor(reward[int(world.row_N[n])], dtype=torch.float64)
        return ppo(ratio(world, student_NV, n), advantage, 0.2, 0.2)

    return batch_mean(world, loss)


def soda(world: World, student_NV: Tensor) -> Tensor:
    """-log sigmoid(beta [log p/q_w (y+) - log p/q_w (y-)]), sequence sums, mean over pairs."""
    losses = []
    for group in set(world.groups):
        gain = {}
        for row in range(world.size):
            if world.groups[row] == group:
                gap_NV = student_NV - world.tables["warmup"]
                gain[world.origins[row]] = torch.stack(
                    [sampled(world, gap_NV, n) for n in world.tokens(row)]
                ).sum()
        losses.append(-torch.sigmoid(0.1 * (gain["teacher"] - gain["student"])).log())
    return torch.stack(losses).mean()


def video_opd(world: World, student_NV: Tensor) -> Tensor:
    """Prompts with a teacher's score of 0.5 or more; all of them, since fewer than 2500."""
    kept = [row for row in range(world.size) if world.teacher_rewards[row] >= 0.5]
    advantage = log_ratio(world, student_NV)
    return batch_mean(world, lambda n: -advantage(n) * sampled(world, student_NV, n), kept)


def aligndistil(world: World, student_NV: Tensor) -> Tensor:
    """(beta / alpha) KL(p || softmax(z_d + alpha (z_d - z_r))), alpha = 15 sum|p_d - p_r| + 1e-3."""
    dpo_NV, reverse_NV = world.tables["dpo"], world.tables["reverse_dpo"]

    def loss(n: int) -> Tensor:
        alpha = 15 * (dpo_NV[n].exp() - reverse_NV[n].exp()).abs().sum() + 1e-3
        target_V = (dpo_NV[n] + alpha * (dpo_NV[n] - reverse_NV[n])).log_softmax(-1)
        return 0.1 / alpha * kl(student_NV[n], target_V)

    return batch_mean(world, loss)


def mgsd(world: World, student_NV: Tensor) -> Tensor:
    advantage = log_ratio(world, student_NV, "privileged")
    return token_mean(world, lambda n: ppo(ratio(world, student_NV, n), advantage(n), 0.2, 0.3, 3.0))


def v_zero(world: World, student_NV: Tensor) -> Tensor:
    """w = clip(1 + 0.5 a, 0, 2), a standardised by the population deviation of the group."""
    gap_NV = world.tables["privileged"] - world.tables["negative"]
    score = [fmean(float(sampled(world, gap_NV, n)) for n in world.tokens(r)) for r in range(world.size)]
    advantage = log_ratio(world, student_NV, "privileged")
    weights = []
    for row in range(world.size):
        own = torch.tensor(
            [score[r] for r in range(world.size) if world.groups[r] == world.groups[row]], dtype=torch.float64
        )
        a = (score[row] - own.mean()) / (own.std(correction=0) + 1e-6)
        weights.append((1 + 0.5 * a).clamp(0, 2))
    per_rollout = means(
        world, lambda n: ppo(ratio(world, student_NV, n), advantage(n).clamp(-10, 10), 0.2, 0.2, 3.0)
    )
    return torch.stack([w * value for w, value in zip(weights, per_rollout, strict=True)]).mean()


def raft(world: World, student_NV: Tensor) -> Tensor:
    """L_SFT over teacher rows + T^2 KL of tempered distributions over student rows; lambda = 1 at first."""
    teacher = [row for row in range(world.size) if world.origins[row] == "teacher"]
    student = [row for row in range(world.size) if world.origins[row] == "student"]
    table_NV = world.tables["privileged"]

    def tempered(n: int) -> Tensor:
        return 1.5**2 * kl((table_NV[n] / 1.5).log_softmax(-1), (student_NV[n] / 1.5).log_softmax(-1))

    sft = batch_mean(world, lambda n: -sampled(world, student_NV, n), teacher)
    return sft + batch_mean(world, tempered, student)


REFERENCES: dict[str, Reference] = {
    "lightning_opd": Reference(lightning_opd),
    "effopd": Reference(opd),
    "g_opd": Reference(extrapolated(0.8, baseline=False), moves="rests in expectation alone"),
    "g_opd_baseline": Reference(extrapolated(0.8, baseline=True), moves="rests past the teacher"),
    "exopd": Reference(extrapolated(1.25, baseline=False), moves="rests in expectation alone"),
    "exopd_baseline": Reference(extrapolated(1.25, baseline=True), moves="rests past the teacher"),
    "uni_opd": Reference(uni_opd, moves="shifted by the margin", is_surrogate=True),
    "uni_opd_mask": Reference(uni_opd_mask, is_surrogate=True),
    "scope": Reference(scope(1.0, code=False), moves="maximum likelihood of the correct"),
    "scope_code": Reference(scope(-1.0, code=True), moves="maximum likelihood of the correct"),
    "vopd": Reference(vopd),
    "f_forward_kl": Reference(full_divergence("forward_kl")),
    "f_reverse_kl": Reference(full_divergence("reverse_kl")),
    "f_jsd": Reference(full_divergence("jsd")),
    "f_skew_kl": Reference(full_divergence("skew_kl")),
    "f_skew_reverse_kl": Reference(full_divergence("skew_reverse_kl")),
    "f_tv": Reference(full_divergence("tv"), moves="no derivative at its minimum"),
    "f_alpha": Reference(full_divergence("alpha")),
    "tcod": Reference(tcod),
    "opsd": Reference(full_divergence("jsd", "privileged"), rests_at="privileged"),
    "opsd_sampled": Reference(
        lambda world, student_NV: opd(world, student_NV, "privileged"), rests_at="privileged"
    ),
    "opsd_code": Reference(opsd_code, rests_at="privileged"),
    "renio_code": Reference(
        lambda world, s_NV: renio(world, s_NV, 1.1), moves="no derivative at its minimum"
    ),
    "renio": Reference(renio, moves="no derivative at its minimum"),
    "many_faces": Reference(many_faces),
    "many_faces_renormalised": Reference(full_divergence("reverse_kl")),
    "extrapolation_cliff": Reference(extrapolation_cliff, moves="rests in expectation alone"),
    "prune_opd": Reference(prune_opd),
    "tip": Reference(tip("soft_or")),
    "tip_entropy": Reference(tip("entropy")),
    "sod": Reference(sod, moves="reward", is_surrogate=True),
    "dgrpo": Reference(dgrpo, moves="reward", is_surrogate=True),
    "soda": Reference(soda, moves="preference"),
    "video_opd": Reference(video_opd),
    "aligndistil": Reference(aligndistil, moves="rests past the teacher"),
    "mgsd": Reference(mgsd, rests_at="privileged", is_surrogate=True),
    "v_zero": Reference(v_zero, rests_at="privileged", is_surrogate=True),
    "raft": Reference(raft, moves="maximum likelihood of refined answers"),
    "decoupling_student_fkl": Reference(full_divergence("forward_kl", rows="student")),
    "decoupling_student_rkl": Reference(full_divergence("reverse_kl", rows="student")),
    "decoupling_teacher_fkl": Reference(full_divergence("forward_kl", rows="teacher")),
    "decoupling_teacher_rkl": Reference(full_divergence("reverse_kl", rows="teacher")),
    "caopd": Reference(full_divergence("reverse_kl", "privileged"), rests_at="privileged"),
    "vpd": Reference(full_divergence("reverse_kl", "privileged"), rests_at="privileged"),
    "dp_opd": Reference(dp_opd),
    "zppo": Reference(zppo, moves="reward", is_surrogate=True),
    "trd": Reference(full_divergence("forward_kl", "privileged", rows="teacher"), rests_at="privileged"),
    "sparse_to_dense": Reference(full_divergence("reverse_kl")),
    "decoupling_mix": Reference(full_divergence("mix")),
    "decoupling_lengths": Reference(full_divergence("mix")),
    "hy_embodied": Reference(full_divergence("forward_kl")),
    "truncated_importance": Reference(truncated_importance),
    "recommended_topk_reverse_kl": Reference(full_divergence("reverse_kl")),
    "recommended_residual": Reference(full_divergence("reverse_kl")),
    "recommended_baseline_ratio": Reference(baseline_ratio),
    **SAMPLED_TOKEN,
}
