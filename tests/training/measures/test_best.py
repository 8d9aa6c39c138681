"""The best student and the averaged one: what is kept, what is exported, and where a run ends."""

import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from training_runs import CALM, REVERSE_KL, assert_same_bits, rows_of, weights_of

from lightopd.errors import TrainingError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import BestConfig, FinetuneConfig, OptimizerConfig
from lightopd.training.measures.best import Best, is_over, updated_best
from lightopd.training.warm_start import optimizer_state_hash

UNMOVED = OptimizerConfig(lr=1e-30, weight_decay=0)
# Its steps grow, so the divergence falls and then rises.
OVERSHOOTING = {
    "steps": 12,
    "optimizer": OptimizerConfig(lr=0.3, warmup_steps=12),
    "held_out": 6,
    "held_out_every": 1,
    "best": {"metric": "held_out"},
    "keep_checkpoints": 1,
}


def test_the_lowest_divergence_is_the_best_and_of_equal_ones_the_first():
    best, config = None, BestConfig(patience=2)
    seen = []
    for step, value in enumerate([3.0, 2.0, 2.0, 2.5, 1.0], start=1):
        best = updated_best(best, config, step, value)
        seen.append((best.step, best.waited, is_over(best, config)))
    assert seen == [(1, 0, False), (2, 0, False), (2, 1, False), (2, 2, True), (5, 0, False)]


def test_a_best_of_another_metric_is_forgotten_and_ends_nothing():
    other = Best(metric="avg_at_k", step=1, value=0.5, waited=9)
    assert not is_over(other, BestConfig(patience=1))
    assert updated_best(other, BestConfig(), 4, 0.7) == Best(metric="held_out", step=4, value=0.7)


def test_the_best_checkpoint_outlives_newer_ones_and_is_exported(train, tmp_path):
    result = train(objective=REVERSE_KL, **OVERSHOOTING)
    held_out = [row["held_out"] for row in rows_of(result)]
    best = 1 + held_out.index(min(held_out))
    assert 1 < best < 12, held_out
    assert (result.steps, result.exported_step) == (12, best)
    assert result.metrics["held_out"] == min(held_out)
    folders = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert folders == [f"step-{best:06d}", "step-000012"]
    stored = (tmp_path / "out" / "checkpoints" / folders[0] / "model.safetensors").read_bytes()
    assert (result.student / "model.safetensors").read_bytes() == stored


def test_a_run_ends_after_its_patience_and_goes_on_with_more(train, caplog):
    caplog.set_level("INFO")
    patient = train("patient", REVERSE_KL, **OVERSHOOTING)
    hasty = OVERSHOOTING | {"best": {"patience": 2}}
    ended = train("ended", REVERSE_KL, **hasty)
    assert ended.steps == ended.exported_step + 2 < 12
    said = [record.getMessage() for record in caplog.records if "training ends" in record.getMessage()]
    assert len(said) == 1
    assert f"at step {ended.exported_step}" in said[0]
    assert train("ended", REVERSE_KL, **hasty).steps == ended.steps
    assert_same_bits(patient, train("ended", REVERSE_KL, **OVERSHOOTING))


def test_a_finished_run_exports_what_is_asked_for_now_or_says_that_it_did_not_choose(train, tmp_path):
    best = train(objective=REVERSE_KL, **OVERSHOOTING)
    carried = optimizer_state_hash(tmp_path / "out", ModelConfig(path=str(best.student)))
    last = train(objective=REVERSE_KL, **(OVERSHOOTING | {"best": None}))
    assert (best.exported_step, last.exported_step) == (best.exported_step, 12) != (12, 12)
    stored = tmp_path / "out" / "checkpoints" / "step-000012" / "model.safetensors"
    assert (last.student / "model.safetensors").read_bytes() == stored.read_bytes()
    assert optimizer_state_hash(tmp_path / "out", ModelConfig(path=str(last.student))) != carried
    with pytest.raises(TrainingError, match="kept its student by held_out, not by avg_at_k; set best back"):
        train(objective=REVERSE_KL, **(OVERSHOOTING | {"best": {"metric": "avg_at_k"}}))
    train("plain", REVERSE_KL, **(OVERSHOOTING | {"best": None}))
    with pytest.raises(TrainingError, match="kept its student by its last step, not by held_out"):
        train("plain", REVERSE_KL, **OVERSHOOTING)


def test_a_best_checkpoint_that_is_gone_is_said_before_the_run_goes_on(train, tmp_path, caplog):
    first = train(objective=REVERSE_KL, **OVERSHOOTING)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{first.exported_step:06d}")
    result = train(objective=REVERSE_KL, **(OVERSHOOTING | {"steps": 14}))
    assert f"step-{first.exported_step:06d}, the best so far" in caplog.text
    assert result.exported_step in (13, 14)


def test_a_best_checkpoint_that_is_gone_is_named(train, tmp_path):
    result = train(objective=REVERSE_KL, **OVERSHOOTING)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{result.exported_step:06d}")
    with pytest.raises(
        TrainingError, match=rf"step-{result.exported_step:06d}, the best of the run, is gone"
    ):
        train(objective=REVERSE_KL, **OVERSHOOTING)


def test_the_best_of_what_is_not_measured_is_refused():
    with pytest.raises(ValidationError, match="held_out is 0; set held_out to 50 or more"):
        FinetuneConfig(best={})


def test_the_average_follows_the_weights_and_changes_no_step(train, tmp_path, student_folder):
    kept = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "optimizer": OptimizerConfig(lr=1e-2)}
    plain, averaged = train("plain", **kept), train("averaged", ema_decay=0.75, **kept)
    assert rows_of(plain) == rows_of(averaged)
    expected = {name: tensor.double() for name, tensor in weights_of(student_folder).items()}
    for step in range(1, 5):
        folders = [tmp_path / name / "checkpoints" / f"step-00000{step}" for name in ("plain", "averaged")]
        own, same = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.equal(own[name], same[name]) for name in own)
        for name, tensor in own.items():
            expected[name] = 0.75 * expected[name] + 0.25 * tensor.double()
    exported, last = load_file(averaged.student / "model.safetensors"), weights_of(plain.student)
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(tensor, last[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_held_out_rollouts_are_measured_on_what_is_exported(train, precision):
    settings = {"held_out": 6, "precision": precision, "steps": 3}
    averaged = train(objective=REVERSE_KL, ema_decay=0.75, optimizer=OptimizerConfig(lr=1e-2), **settings)
    again = train("again", REVERSE_KL, student=averaged.student, **(settings | {"optimizer": UNMOVED}))
    plain = train("plain", REVERSE_KL, optimizer=OptimizerConfig(lr=1e-2), **settings)
    assert averaged.metrics["held_out"] == again.metrics["held_out"] != plain.metrics["held_out"]


def test_a_run_goes_on_with_its_average_to_the_last_bit(train):
    settings = OVERSHOOTING | {"ema_decay": 0.5}
    whole = train("whole", REVERSE_KL, **settings)
    train("cut", REVERSE_KL, **(settings | {"steps": 5}))
    assert_same_bits(whole, train("cut", REVERSE_KL, **settings))
    with pytest.raises(TrainingError, match=r"ema_decay is null, there it was 0\.5"):
        train("cut", REVERSE_KL, **(settings | {"ema_decay": None, "steps": 13}))


@pytest.mark.parametrize("merge", [False, True])
def test_an_averaged_adapter_is_exported_as_one(train, tmp_path, merge):
    adapter = {"rank": 2, "alpha": 4, "merge": merge}
    kept = {"steps": 2, "checkpoint_every": 1, "optimizer": OptimizerConfig(lr=1e-2), "adapter": adapter}
    result = train(ema_decay=0.75, **kept)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    last = tmp_path / "out" / "checkpoints" / "step-000002"
    average = load_file(last / "average.safetensors")[name.replace(".weight", ".default.weight")]
    if merge:
        own = load_file(last / "adapter_model.safetensors")
        assert not torch.equal(own[name], average)
        assert not (result.student / "adapter_config.json").exists()
        assert any("q_proj" in key for key in load_file(result.student / "model.safetensors"))
    else:
        assert torch.equal(load_file(result.student / "adapter_model.safetensors")[name], average)


def test_an_optimiser_is_not_carried_to_averaged_weights(train, tmp_path):
    result = train(ema_decay=0.5, optimizer=CALM, steps=2)
    with pytest.raises(TrainingError, match="leave ema_decay out there"):
        optimizer_state_hash(tmp_path / "out", ModelConfig(path=str(result.student)))
