"""What choices keep and lose, held to sums over the whole vocabulary in float64; which one is named."""

import numpy as np
import pytest

from lightopd.cache.signals.rounding import rounded, rounded_tails
from lightopd.pipelines.shared.costs.choices import (
    PRECISION,
    WIDEST,
    Choice,
    Sample,
    Whole,
    choice_row,
    cut,
    fitting,
    named,
)
from lightopd.schemas.records import RolloutSignal

VOCABULARY = 300


def teachers(seed, num=40):
    """Log-probabilities [N, V] of random teachers, float64, peaked as real ones are."""
    logits_NV = 3 * np.random.default_rng(seed).normal(size=(num, VOCABULARY))
    return logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True))


def scored(logprobs_NV, entries=VOCABULARY):
    order_NK = np.argsort(-logprobs_NV, axis=1)[:, :entries]
    sorted_NK = np.take_along_axis(logprobs_NV, order_NK, 1)
    with np.errstate(divide="ignore"):
        tails_N = np.log(np.clip(1 - np.exp(sorted_NK).sum(1), 0, 1))
    return RolloutSignal(
        logprobs=logprobs_NV[:, 0].astype(np.float32),
        topk_counts=np.full(len(logprobs_NV), entries, np.int32),
        topk_ids=order_NK.ravel().astype(np.int32),
        topk_logprobs=sorted_NK.ravel().astype(np.float32),
        tail_logprobs=tails_N.astype(np.float32),
    )


def whole(logprobs_NV):
    probs_NV = np.exp(logprobs_NV)
    return Whole(probs_NV.sum(0), float((probs_NV * logprobs_NV).sum()))


def reference(teacher_NV, calibration_NV, choice, shaped):
    """KL(teacher || rebuilt) by building the whole distribution of every position."""
    shape_V = np.ones(VOCABULARY)
    if shaped:
        is_kept_NV = kept_by(calibration_NV, choice)
        shape_V = np.where(is_kept_NV, 0, np.exp(calibration_NV)).sum(0)
    is_kept_NV = kept_by(teacher_NV, choice)
    stored_NV = np.exp(rounded(teacher_NV.astype(np.float32), PRECISION).astype(np.float64))
    tails_N = np.log(np.where(is_kept_NV, 0, np.exp(teacher_NV)).sum(1))
    tails_N = np.exp(rounded_tails(tails_N.astype(np.float32), PRECISION).astype(np.float64))
    spread_NV = np.where(is_kept_NV, 0, shape_V)
    spread_NV *= tails_N[:, None] / spread_NV.sum(1, keepdims=True)
    rebuilt_NV = np.where(is_kept_NV, stored_NV, spread_NV)
    rebuilt_NV /= rebuilt_NV.sum(1, keepdims=True)
    return (np.exp(teacher_NV) * (teacher_NV - np.log(rebuilt_NV))).sum(1).mean()


def kept_by(logprobs_NV, choice):
    rank_NV = np.argsort(np.argsort(-logprobs_NV, axis=1), axis=1)
    return (rank_NV < choice.top_k) & (np.exp(logprobs_NV) >= choice.min_probability)


@pytest.mark.parametrize("choice", [Choice("a", 8), Choice("b", 32), Choice("c", WIDEST, 3e-3)])
def test_the_loss_is_that_of_the_whole_distributions_in_float64(choice):
    ours, others = teachers(0), teachers(1)
    sample = Sample(["r"], [scored(ours)], whole(ours), [scored(others)], whole(others))
    row = choice_row(choice, sample)
    assert row["kl_uniform"] == pytest.approx(reference(ours, others, choice, shaped=False), abs=1e-4)
    assert row["kl_shaped"] == pytest.approx(reference(ours, others, choice, shaped=True), abs=1e-4)
    assert row["entries"] == pytest.approx(kept_by(ours, choice).sum(1).mean(), abs=0.06)


def test_what_a_cut_leaves_out_is_in_its_tail():
    ours = teachers(2)
    kept = cut(scored(ours, 64), Choice("a", 8))
    assert (kept.topk_counts == 8).all()
    mass_N = np.exp(kept.topk_logprobs.reshape(-1, 8)).sum(1) + np.exp(kept.tail_logprobs)
    np.testing.assert_allclose(mass_N, 1, atol=1e-5)


def test_without_the_whole_vocabulary_nothing_is_said_of_the_loss_and_none_is_named():
    rows = [choice_row(each, Sample(["r"], [scored(teachers(0), 64)], None)) for each in (Choice("a", 8),)]
    assert rows[0]["kl_uniform"] is None
    assert rows[0]["kl_shaped"] is None
    assert named(rows) is None


def test_a_choice_wider_than_what_was_scored_is_not_told():
    told = [each.name for each in fitting([scored(teachers(0), 64)], VOCABULARY)]
    assert "top-64" in told
    assert "top-128" not in told
    assert "p > 0.0001" not in told


def test_the_fewest_bytes_below_the_limit_are_named_and_else_the_least_loss():
    def row(name, size, uniform, shaped):
        return {"choice": name, f"bytes_{PRECISION}": size, "kl_uniform": uniform, "kl_shaped": shaped}

    small, middle, large = row("s", 40, 0.3, 0.2), row("m", 80, 0.15, 0.09), row("l", 160, 0.06, 0.04)
    assert named([small, middle, large]) == "m"
    assert named([small]) == "s"
    assert named([{**each, "kl_shaped": None} for each in (small, middle, large)]) == "l"
