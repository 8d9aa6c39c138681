"""Importance ratios and the residual, in expectation over the distribution that sampled, exactly."""

import pytest
import torch
from objective_cases import evaluate, make_world, objective
from one_position import PLAIN, RATIO, Context, V, context, expected_gradient

from lightopd.schemas.objectives.objective import ObjectiveConfig

CAPPED_BASELINE = objective(
    target={"kind": "log_ratio", "clip": None},
    baseline={"kind": "expected", "ratio_cap": 1e9},
    token_weights=[{"kind": "ratio", "cap": 1e9}],
)
PPO = objective(
    target={"kind": "log_ratio", "clip": None},
    token_weights=[{"kind": "ppo_clip", "low": 0.9999, "high": 1e9, "dual": None}],
)


@pytest.mark.parametrize("seed", [0, 2, 7])
@pytest.mark.parametrize("name", ["ratio", "ppo_clip"])
def test_a_ratio_needs_who_sampled_where_that_is_not_the_student_at_temperature_one(name, seed):
    """At temperature 0.8 the stored log-probabilities leave a tenth of the gradient wrong and more."""
    at = context(seed, drift=0.5)
    cooler_V = (at.rollout_V / 0.8).log_softmax(0)
    config = {"ratio": RATIO, "ppo_clip": PPO}[name]
    online_V = expected_gradient(PLAIN, at, sampler="student")
    with_raw_V = expected_gradient(config, at, sampler=cooler_V)
    with_behavior_V = expected_gradient(config, at, sampler=cooler_V, behavior_V=cooler_V)
    assert (with_raw_V - online_V).norm() / online_V.norm() > 0.09
    torch.testing.assert_close(with_behavior_V, online_V)


def test_the_cap_of_a_baseline_asks_who_sampled():
    at = context(3, drift=0.5)
    cooler_V = (at.rollout_V / 0.8).log_softmax(0)
    raw_V = expected_gradient(CAPPED_BASELINE, at, sampler=cooler_V)
    assert not torch.allclose(
        raw_V, expected_gradient(CAPPED_BASELINE, at, sampler=cooler_V, behavior_V=cooler_V)
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_a_residual_is_unbiased_under_the_distribution_that_sampled(divergence):
    at = context(5, drift=0.7)
    cooler_V = (at.rollout_V / 0.8).log_softmax(0)
    exact_V = expected_gradient(plain(divergence), at)
    found_V = expected_gradient(residual(divergence), at, 2, sampler=cooler_V, behavior_V=cooler_V)
    torch.testing.assert_close(found_V, exact_V)
    assert (expected_gradient(residual(divergence), at, 2, sampler=cooler_V) - exact_V).norm() > 1e-3


def residual(divergence: str = "reverse_kl", **keys: object) -> ObjectiveConfig:
    return objective(target={"kind": "divergence", "divergence": divergence, "residual": keys})


def plain(divergence: str = "reverse_kl") -> ObjectiveConfig:
    return objective(target={"kind": "divergence", "divergence": divergence})


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("top_k", [1, 4, V])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_with_its_residual_a_cut_support_has_the_gradient_of_the_vocabulary(divergence, top_k, drift):
    at = context(15, drift)
    exact_V = expected_gradient(plain(divergence), at)
    torch.testing.assert_close(expected_gradient(residual(divergence), at, top_k), exact_V)
    if top_k < V:
        assert (expected_gradient(plain(divergence), at, top_k) - exact_V).norm() > 0.01


def test_the_forward_residual_is_the_importance_weighted_likelihood_of_the_tail():
    """In expectation: - sum over K of T log s - 1[a outside K] (T(a) / mu(a)) log s(a)."""
    at = context(16, drift=0.7)
    logits_V = at.student_V.clone().requires_grad_()
    student_V, teacher_V = logits_V.log_softmax(0), at.tables["teacher"]
    is_kept_V = torch.zeros(V, dtype=torch.bool)
    is_kept_V[teacher_V.topk(4).indices] = True
    ratio_V = (teacher_V - at.rollout_V).exp()
    sampled = (at.rollout_V.exp() * ratio_V * student_V)[~is_kept_V].sum()
    wanted = -(teacher_V.exp() * student_V)[is_kept_V].sum() - sampled
    (wanted_V,) = torch.autograd.grad(wanted, logits_V)
    torch.testing.assert_close(expected_gradient(residual("forward_kl"), at, 4), wanted_V)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_every_sample_of_a_residual_is_at_rest_at_the_teacher(divergence):
    world = make_world(1)
    config = residual(divergence)
    _, gradient_NV, _ = evaluate(config, world, top_k=2, student_NV=world.tables["teacher"])
    assert gradient_NV.abs().max() < 1e-9


def test_a_residual_of_eta_zero_is_the_plain_divergence_and_its_value_is_always():
    world = make_world(1)
    value, gradient_NV, _ = evaluate(plain(), world, top_k=3)
    same, same_NV, _ = evaluate(residual(eta=0), world, top_k=3)
    torch.testing.assert_close(same_NV, gradient_NV)
    moved, moved_NV, _ = evaluate(residual(), world, top_k=3)
    assert value == pytest.approx(same) == pytest.approx(moved)
    assert (moved_NV - gradient_NV).abs().max() > 1e-3


def error_of_draws(config: ObjectiveConfig, at: Context, top_k: int, draws: int = 256) -> float:
    """Root mean square error of a mean over draws against the gradient of the whole vocabulary."""
    mean_V = expected_gradient(config, at, top_k)
    square = torch.zeros((), dtype=torch.float64)
    for token in range(V):
        only_V = torch.full((V,), -float("inf"), dtype=torch.float64)
        only_V[token] = 0.0
        alone_V = expected_gradient(config, at, top_k, sampler=only_V)
        square = square + at.rollout_V[token].exp() * alone_V.square().sum()
    variance = square - mean_V.square().sum()
    bias_V = mean_V - expected_gradient(plain(), at)
    return (bias_V.square().sum() + variance / draws).sqrt().item()


@pytest.mark.parametrize("top_k", [2, 4])
def test_a_residual_has_the_smallest_error_where_the_teacher_is_near(top_k):
    """The teacher half a nat from the student that sampled. Far away the tail alone has the smaller one."""
    errors = dict.fromkeys(("plain", "ratio", "tail", "residual"), 0.0)
    configs = {"plain": PLAIN, "ratio": RATIO, "tail": plain(), "residual": residual(cap=2.0)}
    for seed in range(4):
        at = context(100 + seed, drift=0.5)
        noise_V = torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        near = Context(at.student_V, at.rollout_V, {"teacher": (at.rollout_V + noise_V / 2).log_softmax(0)})
        for name, config in configs.items():
            errors[name] += error_of_draws(config, near, top_k)
    assert errors["residual"] < 0.9 * min(errors["ratio"], errors["tail"], errors["plain"])
