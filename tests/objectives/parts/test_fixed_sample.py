"""Why a cached sampled-token loss can lose: not its expectation, but the sample that never changes.

C = contexts with a table of logits each, one cached token in every context.
"""

import torch
from objective_cases import objective, tail_of
from one_position import PLAIN, RATIO, V, context, expected_gradient
from torch import Tensor

from lightopd.objectives.base.batch import BatchTotals, RolloutBatch, SignalBatch, StudentTokens
from lightopd.objectives.loss import compute_loss
from lightopd.objectives.requirements import needs
from lightopd.schemas.objectives.objective import ObjectiveConfig

C, K = 64, 5
TOPK = objective(target={"kind": "divergence"})


def tables(seed: int, spread: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """Student at rollout and teacher [C, V], and the token drawn from the student in each context [C]."""
    random = torch.Generator().manual_seed(seed)
    base_CV = 1.5 * torch.randn((C, V), generator=random, dtype=torch.float64)
    noise_CV = spread * torch.randn((C, V), generator=random, dtype=torch.float64)
    rollout_CV, teacher_CV = base_CV.log_softmax(1), (base_CV + noise_CV).log_softmax(1)
    return rollout_CV, teacher_CV, torch.multinomial(rollout_CV.exp(), 1, generator=random)[:, 0]


def divergence(student_CV: Tensor, teacher_CV: Tensor) -> float:
    """Mean KL(student || teacher)."""
    return float((student_CV.exp() * (student_CV - teacher_CV)).sum(1).mean())


def batch_of(rollout_CV: Tensor, teacher_CV: Tensor, ids_C: Tensor) -> RolloutBatch:
    topk_CK, ids_CK = teacher_CV.topk(K, dim=1)
    every = torch.arange(C)
    return RolloutBatch(
        ids_N=ids_C,
        row_N=every,
        index_N=torch.zeros_like(every),
        loss_mask_N=torch.ones(C, dtype=torch.bool),
        turns_N=torch.zeros_like(every),
        ref_logprobs_N=rollout_CV.gather(1, ids_C[:, None])[:, 0],
        signals={
            "teacher": SignalBatch(
                teacher_CV.gather(1, ids_C[:, None])[:, 0], ids_CK, topk_CK, tail_of(teacher_CV, ids_CK)
            )
        },
        lengths_R=torch.ones_like(every),
        rewards_R=torch.zeros(C),
        is_truncated_R=torch.zeros(C, dtype=torch.bool),
        groups_R=every,
        domains=(None,) * C,
        rollout_ids=tuple(map(str, range(C))),
        totals=BatchTotals(C, C),
        longest=1,
        num_turns=1,
    )


def followed(config: ObjectiveConfig, rollout_CV: Tensor, teacher_CV: Tensor, ids_C: Tensor) -> Tensor:
    """The student [C, V] after many steps on the one sample."""
    batch = batch_of(rollout_CV, teacher_CV, ids_C)
    logits_CV = rollout_CV.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits_CV], lr=0.05)
    for _ in range(200):
        student_CV = logits_CV.log_softmax(1)
        topk_ids_CK = batch.signals["teacher"].topk_ids_NK
        student = StudentTokens(
            student_CV.gather(1, ids_C[:, None])[:, 0],
            torch.zeros(C, dtype=torch.float64),
            {name: student_CV.gather(1, topk_ids_CK) for name in needs(config).supports},
            {name: tail_of(student_CV, topk_ids_CK) for name in needs(config).supports},
        )
        optimizer.zero_grad()
        (C * compute_loss(config, batch, student).value).backward()
        optimizer.step()
    return logits_CV.detach().log_softmax(1)


def test_a_sample_that_never_changes_leaves_most_of_the_gap_where_a_top_k_closes_it():
    rollout_CV, teacher_CV, ids_C = tables(0)
    before = divergence(rollout_CV, teacher_CV)
    after = {
        name: divergence(followed(config, rollout_CV, teacher_CV, ids_C), teacher_CV)
        for name, config in {"plain": PLAIN, "ratio": RATIO, "topk": TOPK}.items()
    }
    assert after["topk"] < 0.2 * before
    assert 0.4 * before < min(after["plain"], after["ratio"])


def test_in_expectation_the_teacher_attracts_under_the_plain_loss():
    """From random students, with the sampler where it was: descent on the expectation ends at the teacher."""
    rollout_CV, teacher_CV, _ = tables(1)
    logits_CV = rollout_CV + 0.5 * torch.randn(
        rollout_CV.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    before = divergence(logits_CV.log_softmax(1), teacher_CV)
    for _ in range(10_000):
        logits_CV = logits_CV - 1.0 * expectation_CV(logits_CV.log_softmax(1), rollout_CV, teacher_CV)
    assert divergence(logits_CV.log_softmax(1), teacher_CV) < 1e-3 * before


def expectation_CV(student_CV: Tensor, rollout_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """Gradient of the plain loss by the logits, in expectation over the student at rollout."""
    lead_CV = rollout_CV.exp() * (teacher_CV - student_CV)
    return student_CV.exp() * lead_CV.sum(1, keepdim=True) - lead_CV


def test_that_expectation_is_the_losses_own():
    at = context(3, drift=0.7)
    sides = (at.student_V, at.rollout_V, at.tables["teacher"])
    found_CV = expectation_CV(*(each[None] for each in sides))
    torch.testing.assert_close(found_CV[0], expected_gradient(PLAIN, at))
