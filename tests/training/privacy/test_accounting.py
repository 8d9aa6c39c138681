"""The privacy spent is what Opacus's accountants say of the sampling that a run makes."""

import math

import numpy as np
import pytest

from lightopd.errors import ConfigError
from lightopd.schemas.finetune import PrivacyConfig
from lightopd.training.privacy.accounting import check_passes, epsilon
from lightopd.training.privacy.draws import PoissonDraws

accountants = pytest.importorskip("opacus.accountants")


def of_opacus(kind, noise, rate, steps, delta=1e-5):
    accountant = accountants.create_accountant(kind)
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return accountant.get_epsilon(delta=delta)


@pytest.mark.parametrize("kind", ["rdp", "prv"])
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 20), (0.7, 3)])
def test_poisson_sampling_costs_what_the_accountant_says(kind, noise, steps):
    config = PrivacyConfig(clip=1.0, noise=noise, accountant=kind)
    spent = epsilon(config, steps=steps, batch_sequences=16, num_prompts=1000)
    assert spent == pytest.approx(of_opacus(kind, noise, 0.016, steps), rel=1e-9)


def test_a_known_setting_has_its_known_bound():
    """256 of 60,000, noise 1.1, 60 epochs: the example that libraries of differential privacy share."""
    spent = epsilon(PrivacyConfig(clip=1.0, noise=1.1), steps=14_063, batch_sequences=256, num_prompts=60_000)
    assert 2.5 < spent < 3.1


@pytest.mark.parametrize(("steps", "passes"), [(1, 1), (10, 1), (11, 2), (30, 3)])
def test_a_pass_costs_one_gaussian_mechanism_however_many_steps_it_has(steps, passes):
    config = PrivacyConfig(clip=1.0, noise=3.0, sampling="passes")
    spent = epsilon(config, steps=steps, batch_sequences=10, num_prompts=100)
    assert spent == pytest.approx(of_opacus("rdp", 3.0, 1.0, passes), rel=1e-9)
    # The Gaussian mechanism's Renyi divergence is order / (2 noise^2); Balle et al. (2020), theorem 21.
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
    renyi = passes * orders / (2 * 3.0**2)
    bounds = renyi + np.log1p(-1 / orders) - (np.log(1e-5) + np.log(orders)) / (orders - 1)
    assert spent == pytest.approx(bounds.min(), rel=1e-9)


def test_poisson_sampling_of_the_same_steps_costs_less_than_passes():
    by_chance, in_order = (
        epsilon(
            PrivacyConfig(clip=1.0, noise=1.0, sampling=kind), steps=100, batch_sequences=10, num_prompts=1000
        )
        for kind in ("poisson", "passes")
    )
    assert by_chance < in_order / 2


def test_without_noise_nothing_bounds_what_is_told():
    assert math.isinf(epsilon(PrivacyConfig(clip=1.0, noise=0), steps=1, batch_sequences=1, num_prompts=9))


def test_a_step_larger_than_all_prompts_and_passes_that_are_not_whole_are_refused():
    with pytest.raises(ConfigError, match="batch_sequences is 5, and there are 4 prompts"):
        epsilon(PrivacyConfig(clip=1.0, noise=1.0), steps=1, batch_sequences=5, num_prompts=4)
    in_order = PrivacyConfig(clip=1.0, noise=1.0, sampling="passes")
    with pytest.raises(ConfigError, match="needs one rollout of each prompt, and 10 prompts have 20"):
        check_passes(in_order, 5, 10, 20)
    with pytest.raises(ConfigError, match="10 prompts are no multiple of batch_sequences 4"):
        check_passes(in_order, 4, 10, 10)
    check_passes(in_order, 5, 10, 10)


def test_each_prompt_is_drawn_by_itself_at_the_rate_that_is_accounted_for():
    groups_P = np.repeat(np.arange(40), 2)  # two rollouts of each prompt
    draws = PoissonDraws(groups_P, 8, key=5)
    steps = [draws(step) for step in range(3000)]
    sizes = np.array([len(step) for step in steps])
    assert sizes.mean() == pytest.approx(8, abs=4 * (8 * 0.8 / 3000) ** 0.5)
    assert sizes.var() == pytest.approx(8 * 0.8, rel=0.12)  # of a binomial, not of a batch
    assert all(len(set(groups_P[step])) == len(step) for step in steps)
    of_place = np.bincount(np.concatenate(steps), minlength=80)
    assert of_place.min() > 3000 * 0.1 - 5 * (3000 * 0.1 * 0.9) ** 0.5
    assert of_place.max() < 3000 * 0.1 + 5 * (3000 * 0.1 * 0.9) ** 0.5


def test_draws_depend_on_key_and_step_alone_and_a_step_may_draw_nothing():
    draws, other = (PoissonDraws(np.arange(30), 1, key=key) for key in (5, 6))
    steps = [draws(step) for step in range(50)]
    assert all(
        np.array_equal(step, PoissonDraws(np.arange(30), 1, 5)(place)) for place, step in enumerate(steps)
    )
    assert any(not np.array_equal(step, other(place)) for place, step in enumerate(steps))
    assert any(len(step) == 0 for step in steps)
