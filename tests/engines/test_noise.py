import pytest
import torch
from engine_cases import random_sequences
from fake_engine import FakeEngine
from tiny_models import save_model

from lightopd.config import load_stage
from lightopd.engines.kinds import load_engine
from lightopd.engines.noise import compare, measure_noise, reference_logprobs, refuse_noise
from lightopd.errors import EngineError
from lightopd.pipelines import precompute
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.manifest import NoiseFloor

SEQUENCES = random_sequences(0, [(3, 8), (5, 20), (2, 0), (4, 9)], 24)


def test_an_exact_engine_has_no_noise_and_a_noisy_one_about_what_it_was_given():
    exact = measure_noise(FakeEngine(vocabulary_size=24), SEQUENCES)
    assert (exact.mean_nats, exact.max_nats, exact.tokens) == (0, 0, 37)
    noisy = measure_noise(FakeEngine(vocabulary_size=24, noise_nats=0.01), SEQUENCES)
    assert 0.003 < noisy.mean_nats < 0.03
    assert noisy.max_nats > noisy.mean_nats


def test_only_a_mean_above_the_limit_is_refused():
    found = NoiseFloor(mean_nats=0.04, max_nats=0.3, tokens=10)
    refuse_noise(found, 0.04, "two scorings", "bfloat16")
    with pytest.raises(EngineError, match=r"two scorings lie 0\.04 nats apart on average, 0\.3 at most"):
        refuse_noise(found, 0.039, "two scorings", "bfloat16")


def test_a_wider_format_is_not_advised_where_there_is_none():
    found = NoiseFloor(mean_nats=0.4, max_nats=0.5, tokens=10)
    with pytest.raises(EngineError, match="wider number format than bfloat16"):
        refuse_noise(found, 0.05, "two scorings", "bfloat16")
    with pytest.raises(EngineError, match="attention to eager") as refused:
        refuse_noise(found, 0.05, "two scorings", "float32")
    assert "wider" not in str(refused.value)


def test_the_reference_shares_nothing_with_the_engine(tmp_path, monkeypatch):
    """A fault of the engine's own way to score shows in a cross-check."""
    folder = save_model(tmp_path / "model", 0)
    model = ModelConfig(path=str(folder))
    engine = load_engine(HfEngine(device="cpu"), model)
    monkeypatch.setattr("lightopd.models.head.Head.logits", lambda *_, **__: torch.zeros(()))
    monkeypatch.setattr("lightopd.models.head.last_hidden", lambda *_, **__: torch.zeros(()))
    reference = reference_logprobs(model, SEQUENCES)
    monkeypatch.undo()
    scored = [scores.logprobs for scores in engine.score(SEQUENCES, 0)]
    assert compare(reference, scored).max_nats < 1e-5


def test_the_reference_is_float32_whatever_the_model_is_run_in(tmp_path):
    folder = save_model(tmp_path / "model", 0)
    exact = reference_logprobs(ModelConfig(path=str(folder)), SEQUENCES)
    asked_in_half = reference_logprobs(ModelConfig(path=str(folder), dtype="bfloat16"), SEQUENCES)
    assert [a.tolist() for a in exact] == [b.tolist() for b in asked_in_half]
    assert reference_logprobs(ModelConfig(path="nowhere"), []) == []


def asked(world, tmp_path, **settings):
    import shutil

    shutil.copytree(world.cache, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "signals")
    flags = {"cache": tmp_path / "cache", "teacher": world.teacher, **settings}
    return load_stage("precompute", [], ["top_k=2"], flags)


def test_a_teacher_that_is_too_noisy_is_refused_and_nothing_is_scored(world, tmp_path):
    noisy = FakeEngine(vocabulary_size=24, noise_nats=0.5)
    with pytest.raises(EngineError, match=r"max_noise_nats 0\.05"):
        precompute.run(asked(world, tmp_path), load=lambda *_: noisy)
    assert not list((tmp_path / "cache").glob("signals/*/part-*"))


def test_a_cross_check_is_measured_reported_and_kept(world, tmp_path):
    report = precompute.run(asked(world, tmp_path, cross_check=3))
    assert report.figures["cross_check_max_nats"] < 1e-5
    assert '"cross_check": {' in (tmp_path / "cache/signals/teacher/signal.json").read_text()


def test_an_engine_far_from_transformers_is_refused_by_the_cross_check(world, tmp_path):
    other = FakeEngine(vocabulary_size=24)
    with pytest.raises(EngineError, match="this engine and transformers in float32"):
        precompute.run(asked(world, tmp_path, cross_check=3), load=lambda *_: other)
