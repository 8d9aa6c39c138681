"""`train` names the recommended recipes where the plain loss is likely to lose, and is silent elsewhere."""

import logging

import pytest

from lightopd.cache.store import open_cache
from lightopd.config import load_stage
from lightopd.pipelines import RECIPES, train
from lightopd.pipelines.shared import suggest
from lightopd.pipelines.shared.gap import gap_figures
from lightopd.schemas.configs import TrainConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig

RECIPE = "methods/recommended_topk_reverse_kl"
PAPERS_BATCH = {"steps": 150, "batch_sequences": 100_000}


def suggested(cache, objective=None, **changes):
    settings = {**PAPERS_BATCH, **changes}
    return suggest.suggestion(open_cache(cache), ObjectiveConfig(**(objective or {})), **settings)


def with_gap(monkeypatch, nats):
    monkeypatch.setattr(suggest, "measured_gap", lambda *_: nats)


def test_the_gap_is_the_one_that_precompute_reports(world):
    cache = open_cache(world.cache)
    wanted = gap_figures(cache, "teacher")["gap_nats"]
    assert suggest.measured_gap(cache, "teacher") == pytest.approx(wanted, abs=1e-6)


def test_a_large_gap_brings_both_recipes_with_the_command(world, monkeypatch):
    with_gap(monkeypatch, 0.21)
    line = suggested(world.cache, student="S", out="O")
    assert f"-c {RECIPE} --cache {world.cache} --student S --out O" in line
    assert "methods/recommended_baseline_ratio" in line


def test_a_small_batch_brings_them_even_at_a_small_gap(world, monkeypatch):
    with_gap(monkeypatch, 0.04)
    assert suggested(world.cache, batch_sequences=256) is not None


def test_a_small_gap_and_a_large_batch_are_left_alone(world, monkeypatch):
    with_gap(monkeypatch, 0.04)
    assert suggested(world.cache) is None


@pytest.mark.parametrize(
    "objective",
    [
        {"baseline": "expected"},
        {"token_weights": [{"kind": "ratio", "cap": 2.0}]},
        {"target": {"kind": "divergence", "divergence": "reverse_kl", "support": "tail"}},
    ],
)
def test_a_corrected_objective_is_left_alone(world, monkeypatch, objective):
    with_gap(monkeypatch, 0.4)
    assert suggested(world.cache, objective) is None


def test_a_step_of_live_distillation_is_left_alone(world, monkeypatch):
    with_gap(monkeypatch, 0.4)
    assert suggested(world.cache, steps=1) is None


def test_rollouts_without_the_students_numbers_are_left_alone(world, monkeypatch):
    with_gap(monkeypatch, None)
    assert suggested(world.cache) is None


def asked(world, tmp_path, *files):
    flags = {"cache": world.cache, "student": world.sft / "student", "out": tmp_path / "t", "steps": 2}
    config = load_stage("train", files, ["batch_sequences=6"], flags, RECIPES)
    assert isinstance(config, TrainConfig)
    return config


def test_train_says_it_once_before_the_first_step(world, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightopd"):
        train.run(asked(world, tmp_path))
    lines = [record.getMessage() for record in caplog.records]
    told = [place for place, line in enumerate(lines) if RECIPE in line]
    assert len(told) == 1
    assert told[0] < next(place for place, line in enumerate(lines) if line.startswith("training on"))


def test_a_dry_run_says_it_for_the_plain_loss_only(world, tmp_path):
    assert any(RECIPE in note for note in train.run(asked(world, tmp_path), dry_run=True).notes)
    corrected = train.run(asked(world, tmp_path, RECIPE), dry_run=True)
    assert not any(RECIPE in note for note in corrected.notes)


def test_methods_check_says_it_for_the_plain_loss_only(lightopd, world):
    code, out, _ = lightopd("methods", "check", "lightning_opd", world.cache)
    assert code == 0
    assert f"-c {RECIPE}" in out
    code, out, _ = lightopd("methods", "check", "recommended_topk_reverse_kl", world.cache)
    assert code == 0
    assert f"-c {RECIPE}" not in out
