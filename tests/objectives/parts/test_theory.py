"""What the theory says, in expectation over the tokens a student would sample, exactly.

One context, V tokens. An expectation over a ~ s0 is a batch with one rollout of one token for each token of
the vocabulary, weighed by s0.
"""

from dataclasses import replace

import pytest
import torch
from objective_cases import evaluate, make_world, objective, recipe
from objective_references import REFERENCES
from one_position import PLAIN, RATIO, REVERSE_KL, Context, V, context, expected_gradient, score_rows

from lightopd.schemas.objectives.objective import ObjectiveConfig


def extrapolating(factor: float, baseline: bool) -> ObjectiveConfig:
    return objective(
        target={"kind": "log_ratio", "clip": None},
        extrapolate={"factor": factor},
        baseline="expected" if baseline else None,
    )


@pytest.mark.parametrize("seed", range(3))
def test_lightning_has_the_online_gradient_before_the_first_step(seed):
    at = context(seed)
    torch.testing.assert_close(expected_gradient(PLAIN, at), expected_gradient(PLAIN, at, sampler="student"))


@pytest.mark.parametrize("seed", range(3))
def test_the_online_gradient_is_that_of_the_reverse_kl(seed):
    at = context(seed, drift=0.7)
    torch.testing.assert_close(
        expected_gradient(PLAIN, at, sampler="student"), expected_gradient(REVERSE_KL, at)
    )


@pytest.mark.parametrize("drift", [0.3, 1.0, 2.0])
def test_the_offline_gradient_stays_within_the_bound_and_differs_by_the_covariance(drift):
    """arXiv 2604.13010, theorems 3.5 and 3.7."""
    at = context(4, drift)
    rollout_V, student_V = at.rollout_V.exp(), at.student_V.exp()
    advantage_V = at.tables["teacher"] - at.student_V
    online_V, offline_V = expected_gradient(PLAIN, at, sampler="student"), expected_gradient(PLAIN, at)
    w_V = student_V / rollout_V
    chi2 = (rollout_V * w_V**2).sum() - 1
    largest = score_rows(at.student_V).norm(dim=1).max()
    spread = (rollout_V * advantage_V**2).sum().sqrt()
    assert (online_V - offline_V).norm() <= largest * spread * chi2.sqrt() + 1e-12
    f_NV = -advantage_V[:, None] * score_rows(at.student_V)
    covariance_V = (rollout_V[:, None] * (w_V - 1)[:, None] * f_NV).sum(0)
    torch.testing.assert_close(offline_V, online_V - covariance_V)


def test_the_ratio_to_the_rollouts_student_makes_the_offline_gradient_exact():
    at = context(5, drift=1.0)
    torch.testing.assert_close(expected_gradient(RATIO, at), expected_gradient(REVERSE_KL, at))


def test_a_capped_ratio_lies_between_none_and_the_exact_one():
    at = context(5, drift=1.0)
    exact_V = expected_gradient(REVERSE_KL, at)
    capped = objective(target={"kind": "log_ratio", "clip": None}, token_weights=["ratio"])
    bias = [(expected_gradient(config, at) - exact_V).norm() for config in (PLAIN, capped)]
    assert 0 < bias[1] < bias[0]


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("top_k", [4, V])
@pytest.mark.parametrize("factor", [0.8, 1.25, 1.5])
def test_offline_an_extrapolated_optimum_is_stationary_exactly_with_the_baseline(factor, top_k, baseline):
    """s* = T^lambda B^(1 - lambda) / Z, where A = log Z at every token."""
    at = context(6)
    optimum_V = (factor * at.tables["teacher"] + (1 - factor) * at.tables["reference"]).log_softmax(0)
    gradient_V = expected_gradient(
        extrapolating(factor, baseline), Context(optimum_V, at.rollout_V, at.tables), top_k
    )
    assert (gradient_V.abs().max() < 1e-12) == baseline


@pytest.mark.parametrize(("cap", "rests"), [(1e9, True), (0.5, False)])
def test_a_ratio_keeps_the_extrapolated_optimum_while_its_cap_does_not_bind(cap, rests):
    """E_s0[(s / s0) log Z grad log s] = log Z E_s[grad log s] = 0."""
    at = context(6)
    optimum_V = (1.5 * at.tables["teacher"] - 0.5 * at.tables["reference"]).log_softmax(0)
    target = {"kind": "log_ratio", "clip": None}
    weights = [{"kind": "ratio", "cap": cap}]
    config = objective(target=target, extrapolate={"factor": 1.5}, token_weights=weights)
    gradient_V = expected_gradient(config, Context(optimum_V, at.rollout_V, at.tables))
    assert (gradient_V.abs().max() < 1e-12) == rests


@pytest.mark.parametrize("top_k", [3, V])
def test_a_baseline_leaves_the_on_policy_gradient_as_it_is(top_k):
    at = context(7)
    with_baseline = objective(target={"kind": "log_ratio", "clip": None}, baseline="expected")
    torch.testing.assert_close(expected_gradient(with_baseline, at, top_k), expected_gradient(PLAIN, at))


def test_the_vopd_advantage_has_mean_zero_under_the_student():
    at = context(8, drift=0.5)
    advantage_V = at.tables["teacher"] - at.student_V
    value = (at.student_V.exp() * (at.student_V - at.tables["teacher"])).sum()
    assert (at.student_V.exp() * (advantage_V + value)).sum().abs() < 1e-12


def test_off_policy_a_baseline_biases_the_gradient_and_its_own_ratio_removes_that():
    at = context(9, drift=1.0)
    plain_V = expected_gradient(PLAIN, at)
    biased, mended = (
        objective(target={"kind": "log_ratio", "clip": None}, baseline={"ratio_cap": cap})
        for cap in (None, 1e9)
    )
    assert (expected_gradient(biased, at) - plain_V).norm() > 0.01
    torch.testing.assert_close(expected_gradient(mended, at), plain_V)


def test_k2_has_the_gradient_of_the_live_advantage():
    at = context(10, drift=0.5)
    k2 = objective(target={"kind": "estimator", "estimator": "k2"})
    torch.testing.assert_close(expected_gradient(k2, at), expected_gradient(PLAIN, at))


def test_k3_on_samples_has_the_gradient_of_the_forward_kl():
    at = context(11)
    k3 = objective(target={"kind": "estimator", "estimator": "k3"})
    forward = objective(target={"kind": "divergence", "divergence": "forward_kl"})
    torch.testing.assert_close(expected_gradient(k3, at), expected_gradient(forward, at))


def test_the_forward_kl_gradient_is_student_minus_teacher():
    at = context(12, drift=0.5)
    forward = objective(target={"kind": "divergence", "divergence": "forward_kl"})
    torch.testing.assert_close(
        expected_gradient(forward, at), at.student_V.exp() - at.tables["teacher"].exp()
    )


def test_a_frozen_advantage_is_not_stationary_at_the_teacher():
    at = context(13)
    frozen = objective(
        target={"kind": "log_ratio", "student": "rollout", "clip": None},
        token_weights=[{"kind": "ppo_clip", "low": 0.99, "high": 100.0}],
    )
    here = Context(at.tables["teacher"], at.rollout_V, at.tables)
    assert expected_gradient(frozen, here).abs().max() > 1e-3
    assert expected_gradient(PLAIN, here).abs().max() < 1e-12


def test_offline_ascent_reaches_the_online_optimum_exactly_with_the_baseline():
    """From the student at rollout, tabular, with the full expectation; the distance is KL in nats."""
    at = context(14)
    target_V = (1.5 * at.tables["teacher"] - 0.5 * at.tables["reference"]).log_softmax(0)
    distance = {}
    for baseline in (False, True):
        logits_V = at.rollout_V.clone()
        for _ in range(400):
            here = Context(logits_V.log_softmax(0), at.rollout_V, at.tables)
            logits_V = logits_V - 2.0 * expected_gradient(extrapolating(1.5, baseline), here)
        end_V = logits_V.log_softmax(0)
        distance[baseline] = (end_V.exp() * (end_V - target_V)).sum().item()
    assert distance[True] < 1e-5
    assert distance[False] > 0.01


@pytest.mark.parametrize("top_k", [3, 7])
@pytest.mark.parametrize(
    ("name", "signal"), [(name, one.rests_at) for name, one in REFERENCES.items() if not one.moves]
)
def test_gradient_vanishes_token_by_token_where_the_student_is_the_teacher(name, signal, top_k):
    world = make_world(1)
    if name == "prune_opd":
        config = recipe(name, token_weights=[{"kind": "drift_fade", "top_k": 3}])
    else:
        config = recipe(name)
    _, gradient_NV, _ = evaluate(config, world, top_k=top_k, student_NV=world.tables[signal])
    assert gradient_NV.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["exopd_baseline", "g_opd_baseline", "aligndistil"])
def test_extrapolating_recipes_rest_at_the_extrapolated_teacher(name):
    world, config = make_world(1), recipe(name)
    tables, term = world.tables, config.terms[0]
    teacher_NV, reference_NV = tables[term.signal], tables[term.extrapolate.reference]
    if name == "aligndistil":
        strength = 15 * (teacher_NV.exp() - reference_NV.exp()).abs().sum(1, keepdim=True) + 1e-3
    else:
        strength = term.extrapolate.factor - 1
    optimum_NV = teacher_NV + strength * (teacher_NV - reference_NV)
    _, gradient_NV, _ = evaluate(config, world, student_NV=optimum_NV)
    assert gradient_NV.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["sod", "dgrpo"])
def test_equal_rewards_leave_pure_distillation(name):
    world = replace(make_world(1), rewards=(1.0,) * 8)
    _, gradient_NV, _ = evaluate(recipe(name), world, student_NV=world.tables["teacher"])
    assert gradient_NV.abs().max() < 1e-9
