"""Private runs of the trainer: plain ones without clip and noise, resumed with the same bits, or refused."""

import json
import stat
from dataclasses import replace

import pytest
from training_runs import CALM, assert_close, assert_same_bits, rows_of

from lightopd.config import build, build_run
from lightopd.errors import ConfigError, TrainingError
from lightopd.schemas.configs import TrainConfig
from lightopd.training.privacy.record import privacy_notes

pytest.importorskip("opacus")

DIVERGENCE = {"target": {"kind": "divergence", "divergence": "jsd", "support": "tail"}}
PRIVATE = {"clip": 0.05, "noise": 0.8, "seed": 7}


@pytest.fixture
def single(make_cache, tmp_path):
    """A cache of 12 prompts with one rollout each."""
    named = iter(range(100))

    def alone(rollout):
        return replace(rollout, prompt_id=f"alone-{next(named)}")

    return make_cache(tmp_path / "single", num_rollouts=12, change=alone)


def private(train, cache, out="out", privacy=PRIVATE, objective=DIVERGENCE, **settings):
    defaults = {"steps": 4, "batch_sequences": 4, "optimizer": CALM, "checkpoint_every": 2}
    return train(out, objective, cache=cache, privacy=privacy, **(defaults | settings))


def test_without_clip_and_noise_a_private_run_in_passes_is_the_plain_run(train, single):
    open_ended = {"clip": None, "noise": 0, "sampling": "passes"}
    one = private(train, single, "private", privacy=open_ended, steps=6)
    other = private(train, single, "plain", privacy=None, steps=6)
    for row in rows_of(one):
        assert row["clipped_rollouts"] == 0
    (one.student.parent / "metrics.csv").write_text(
        without_column((one.student.parent / "metrics.csv").read_text(), "clipped_rollouts")
    )
    assert_close(one, other)


def without_column(text, name):
    rows = [line.split(",") for line in text.splitlines()]
    place = rows[0].index(name)
    return "\n".join(",".join(row[:place] + row[place + 1 :]) for row in rows) + "\n"


def test_a_resumed_private_run_has_the_same_bits_and_another_key_gives_other_weights(train, single):
    whole = private(train, single, "whole")
    private(train, single, "cut", steps=2)
    again = private(train, single, "cut")
    assert_same_bits(whole, again)
    other = private(train, single, "other", privacy=PRIVATE | {"seed": 8})
    assert rows_of(other) != rows_of(whole)


def test_the_gradient_of_a_step_is_no_longer_than_the_clip_where_all_are_clipped(train, single):
    result = private(train, single, privacy={"clip": 0.01, "noise": 0, "seed": 7})
    for row in rows_of(result):
        assert row["clipped_rollouts"] == 1
        assert row["grad_norm"] <= 0.01 * 12 / 4  # twelve rollouts at most, over the batch


def test_what_was_spent_is_said_with_its_terms_and_the_key_is_the_owners_alone(train, single):
    result = private(train, single, privacy={"clip": 0.05, "noise": 0.8})
    spent = result.privacy
    assert spent["epsilon"] > 0
    assert (spent["delta"], spent["noise_multiplier"], spent["clip"]) == (1e-5, 0.8, 0.05)
    assert spent["sampling_rate"] == pytest.approx(4 / 12)
    kept = result.student.parent / "privacy.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert json.loads(kept.read_text())["num_prompts"] == 12
    assert "(%.3g, 1e-05) differential privacy" % spent["epsilon"] in privacy_notes(spent)[0]  # noqa: UP031
    assert private(train, single, privacy={"clip": 0.05, "noise": 0.8}).privacy == spent
    kept.unlink()
    with pytest.raises(TrainingError, match=r"privacy\.json is gone, without which step 4"):
        private(train, single, privacy={"clip": 0.05, "noise": 0.8}, steps=6)


def test_two_runs_without_a_seed_have_other_noise_and_no_noise_is_said_to_be_no_privacy(train, single):
    one, other = (
        private(train, single, name, privacy={"clip": 0.05, "noise": 0.8}, steps=2) for name in ("one", "two")
    )
    assert rows_of(one) != rows_of(other)
    silent = private(train, single, "silent", privacy={"clip": 0.05, "noise": 0, "seed": 1}, steps=2)
    assert silent.privacy["epsilon"] is None
    assert privacy_notes(silent.privacy) == ("privacy.noise is 0: nothing is private",)


def test_a_step_that_draws_nothing_is_noise_alone_and_the_run_goes_on(train, single):
    result = private(train, single, batch_sequences=1, steps=12)
    rows = rows_of(result)
    nothing = [row for row in rows if row["tokens"] == 0]
    assert len(rows) == 12
    assert nothing
    assert len(nothing) < 12
    assert all(row["grad_norm"] > 0 for row in nothing)
    assert all(row["loss"] != row["loss"] for row in nothing)


def test_of_a_prompt_with_several_rollouts_one_is_in_a_step_at_most(train, cache):
    assert private(train, cache, batch_sequences=11).privacy["sampling_rate"] == 1  # 11 prompts, 22 rollouts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": DIVERGENCE | {"reduce": "token_mean"}}, "reduce: token_mean"),
        ({"objective": {"select": [{"kind": "margin"}]}}, "selects rollouts"),
        ({"objective": {"rollout_weights": [{"kind": "pivots"}]}}, "a weight over the rollouts of a step"),
        (
            {"objective": {"target": "reward", "token_weights": [{"kind": "ppo_clip"}]}},
            "compares the rollouts of a prompt",
        ),
        ({"objective": {"curriculum": {"kind": "lengths"}}}, "a curriculum or balance"),
        ({"layout": "packed"}, "layout packed"),
        ({"devices": 2}, "more than one device"),
        ({"best": {}, "held_out": 2}, "best, which chooses"),
        (
            {"privacy": PRIVATE | {"sampling": "passes"}, "batch_sequences": 5},
            "no multiple of batch_sequences 5",
        ),
        ({"batch_sequences": 13}, "batch_sequences is 13, and there are 12 prompts"),
    ],
)
def test_what_lets_a_prompt_reach_further_than_its_gradient_is_refused(train, single, change, message):
    with pytest.raises(ConfigError, match=message):
        private(train, single, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"privacy": {"clip": None, "noise": 1.0}}, "noise is measured in clip"),
        ({"privacy": PRIVATE, "continue_from": "before"}, "privacy is counted for one run alone"),
        ({"privacy": PRIVATE, "staleness": {"stop_when_stale": True}}, "an end that no rollout decides"),
    ],
)
def test_settings_under_which_the_bound_would_not_hold_are_refused_where_they_are_loaded(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {"cache": "c", "student": "s", "out": "o", **settings})


@pytest.mark.parametrize("several", [{"rounds": {"steps": 2}}, {"phases": [{"name": "one"}]}])
def test_privacy_over_several_trainings_is_refused_since_nothing_adds_it_up(several):
    plain = {"out": "o", "teacher": "t", "student": "s", "prompts": "p", "train": {"privacy": PRIVATE}}
    with pytest.raises(ConfigError, match="privacy spent in several trainings"):
        build_run(plain | several)


def test_without_opacus_the_extra_is_named(train, single, monkeypatch):
    monkeypatch.setattr("lightopd.training.privacy.limits.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lightopd\[dp\]'"):
        private(train, single)
