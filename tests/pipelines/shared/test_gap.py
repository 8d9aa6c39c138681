"""The gap is measured and judged in one way; `train` speaks where a sampled-token loss is likely to lose."""

import logging

import pytest

from lightopd.cache.index import query
from lightopd.cache.store import open_cache
from lightopd.config import load_stage
from lightopd.pipelines import RECIPES, train
from lightopd.pipelines.methods import list_methods
from lightopd.pipelines.shared import gap
from lightopd.schemas.configs import TrainConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig

RECIPE = "methods/recommended_topk_reverse_kl"
PAPERS_LOSS = {"target": "log_ratio"}
PAPERS_RUN = {"steps": 2, "batch_sequences": 100_000, "learning_rate": 2e-6}


def suggested(cache, objective=PAPERS_LOSS, **changes):
    settings = {**PAPERS_RUN, **changes}
    return gap.suggestion(open_cache(cache), ObjectiveConfig(**objective), **settings)


def with_gap(monkeypatch, nats):
    found = None if nats is None else gap.Gap(nats, 0.001, nats)
    monkeypatch.setattr(gap, "measured_gap", lambda *_: found)


def test_the_gap_is_the_mean_over_trained_tokens(world):
    sql = "select avg(gap) as gap from tokens where signal = 'teacher' and loss_mask"
    wanted = query(world.cache, sql).to_pylist()[0]["gap"]
    found = gap.measured_gap(open_cache(world.cache), "teacher")
    assert found.nats == pytest.approx(wanted, abs=1e-6)
    assert gap.gap_figures(open_cache(world.cache), "teacher")["gap_nats"] == found.nats
    assert 0 < found.error < abs(found.nats) + 1


def test_a_large_gap_brings_the_recipe_with_the_command(world, monkeypatch):
    with_gap(monkeypatch, 0.21)
    line = suggested(world.cache, student="S", out="O")
    assert f"-c {RECIPE} --cache {world.cache} --student S --out O" in line
    assert "gap 0.210 +- 0.001" in line


def test_small_batches_and_passes_bring_it_once_the_weights_move(world, monkeypatch):
    with_gap(monkeypatch, 0.04)
    assert suggested(world.cache, batch_sequences=2) is None
    assert "response tokens a step" in suggested(world.cache, batch_sequences=2, learning_rate=1e-3)
    assert "passes over the cache" in suggested(world.cache, learning_rate=1e-3)


def test_a_small_gap_and_the_papers_run_are_left_alone(world, monkeypatch):
    with_gap(monkeypatch, 0.04)
    assert suggested(world.cache) is None
    assert "is small" in gap.verdict(gap.Gap(0.04, 0.001, 0.04), open_cache(world.cache).manifest.sampling)


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {**PAPERS_LOSS, "baseline": "expected"},
        {"target": {"kind": "divergence", "divergence": "jsd", "support": "tail"}},
        {"target": "mle"},
    ],
)
def test_a_baseline_or_another_target_is_left_alone(world, monkeypatch, objective):
    with_gap(monkeypatch, 0.4)
    assert suggested(world.cache, objective) is None


@pytest.mark.parametrize(
    "name", ["truncated_importance", "uni_opd", "exopd", "sod", "mgsd", "v_zero", "lightning_opd"]
)
def test_a_ratio_or_a_clip_is_no_cure(world, monkeypatch, name):
    with_gap(monkeypatch, 0.4)
    (method,) = [one for one in list_methods(RECIPES / "methods") if one.name == name]
    cache = open_cache(world.cache)
    cache.signals.setdefault("privileged", cache.signals["teacher"])
    assert RECIPE in gap.suggestion(cache, method.objective, **PAPERS_RUN)


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
        train.run(asked(world, tmp_path, "methods/lightning_opd"))
    lines = [record.getMessage() for record in caplog.records]
    told = [place for place, line in enumerate(lines) if RECIPE in line]
    assert len(told) == 1
    assert told[0] < next(place for place, line in enumerate(lines) if line.startswith("training on"))


def test_a_dry_run_says_it_for_the_plain_loss_only(world, tmp_path):
    plain = train.run(asked(world, tmp_path, "methods/lightning_opd"), dry_run=True)
    assert any(RECIPE in note for note in plain.notes)
    for recipes in ((), (RECIPE,)):
        corrected = train.run(asked(world, tmp_path, *recipes), dry_run=True)
        assert not any(RECIPE in note for note in corrected.notes)


def test_methods_check_says_it_for_the_plain_loss_only(lightopd, world):
    code, out, _ = lightopd("methods", "check", "lightning_opd", world.cache)
    assert code == 0
    assert f"-c {RECIPE}" in out
    code, out, _ = lightopd("methods", "check", "recommended_topk_reverse_kl", world.cache)
    assert code == 0
    assert f"-c {RECIPE}" not in out
