"""Rounds over tiny real models: folders and lineage of each, resuming, staleness, and live distillation."""

import json
import shutil

import numpy as np
import pytest
import torch
from run_files import models_of
from safetensors.torch import load_file
from tiny_models import save_model

from lightopd.cache.index import query
from lightopd.cache.store import content_id, open_cache
from lightopd.config import build_run, load_stage
from lightopd.errors import ConfigError, OutputError, TrainingError
from lightopd.pipelines import evaluate, rollout, rounds, train
from lightopd.pipelines import run as pipeline
from lightopd.pipelines.multi_round.equal_rounds import planned_round
from lightopd.pipelines.multi_round.kept_engines import KeptEngines
from lightopd.prompts.load import load_prompts
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import FilePrompts, OptimizerConfig, TrainConfig
from lightopd.schemas.manifest import StudentLineage
from lightopd.training.optimizer import learning_rate


def settings(world, out, **changes):
    """A run file of two rounds of two steps, four prompts in each."""
    plain = {
        **models_of(world, out),
        "rollout": {"sampling": {"max_tokens": 8, "n": 2}, "shard_rollouts": 4},
        "precompute": {"top_k": 4},
        "train": {
            "steps": 2,
            "batch_sequences": 4,
            "optimizer": {"lr": 1e-3},
            "objective": {"target": {"kind": "divergence", "divergence": "reverse_kl", "support": "tail"}},
        },
        "rounds": {"steps": 4, "prompts_per_round": 4},
    }
    for section, change in changes.items():
        plain[section] = {**plain[section], **change} if isinstance(change, dict) else change
    return plain


def run(world, out, **changes):
    return rounds.run(build_run(settings(world, out, **changes)))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished run of two rounds; read only."""
    out = tmp_path_factory.mktemp("rounds") / "run"
    config = build_run(settings(world, out))
    return out, pipeline.run(config)


def lineage(folder):
    return StudentLineage.model_validate_json((folder / "lightopd_student.json").read_text())


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def prompts_of(cache):
    return set(query(cache, "select prompt_id from rollouts").column("prompt_id").to_pylist())


def test_each_round_samples_from_the_student_that_the_round_before_it_made(world, finished):
    out, _ = finished
    made = [lineage(out / name / "train" / "student") for name in ("round-000", "round-001")]
    caches = [open_cache(out / name / "cache") for name in ("round-000", "round-001")]
    assert caches[0].manifest.sampler.identity == lineage(world.sft / "student").student.identity
    assert caches[1].manifest.sampler.identity == made[0].student.identity
    assert made[1].base.identity == made[0].student.identity
    assert made[1].cache == content_id(caches[1], ["teacher"])
    assert lineage(out / "student") == made[1]


def test_every_round_keeps_the_fine_tuning_teacher_so_no_refusal_is_overridden(world, finished):
    out, _ = finished
    first, last = lineage(world.sft / "student"), lineage(out / "student")
    assert last.sft == first.sft
    assert last.overrides == ()


def test_a_refusal_that_is_set_aside_in_every_round_is_told_once_for_each_stage(world, tmp_path):
    other = {"teacher": str(save_model(tmp_path / "other", 5)), "allow": ["teacher-mismatch"]}
    run(world, tmp_path / "run", rounds={"steps": 6}, **other)
    told = [override.stage for override in lineage(tmp_path / "run" / "student").overrides]
    assert sorted(told) == sorted({*told, "precompute"})


def test_each_round_takes_the_next_prompts(finished):
    assert prompts_of(finished[0] / "round-000" / "cache") == {"p0", "p1", "p2", "p3"}
    assert prompts_of(finished[0] / "round-001" / "cache") == {"p4", "p5", "p6", "p7"}


def test_each_round_draws_with_a_seed_of_its_own(finished):
    caches = [open_cache(finished[0] / name / "cache") for name in ("round-000", "round-001")]
    assert [cache.manifest.sampling.seed for cache in caches] == [0, 1]


def test_prompts_past_the_last_one_continue_at_the_first(world):
    config = FilePrompts(path=world.root / "prompts.jsonl", skip=22, limit=4)
    assert [prompt.prompt_id for prompt in load_prompts(config)] == ["p10", "p11", "p0", "p1"]
    everything = load_prompts(config.model_copy(update={"limit": 50}))
    assert len({prompt.prompt_id for prompt in everything}) == len(everything) == 12


def test_the_report_has_a_row_for_each_round(finished):
    out, report = finished
    assert report.figures["rounds_gap_nats"] > 0
    rows = json.loads((out / "rounds.report.json").read_text())["rows"]
    assert [row["round"] for row in rows] == [0, 1]
    assert [row["steps"] for row in rows] == [2, 2]
    assert all(row["gap_nats"] > 0 and 0 < row["ess"] <= 1 for row in rows)


def test_finished_rounds_are_not_repeated(world, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("part-*")}

    def no_engine(*_):
        raise AssertionError("a model was loaded although every round is finished")

    rounds.run(build_run(settings(world, tmp_path / "run")), load=no_engine)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("part-*")}


def test_a_round_that_was_made_before_a_setting_existed_is_still_finished(
    world, finished, tmp_path, monkeypatch
):
    shutil.copytree(finished[0], tmp_path / "run")
    for folder in (tmp_path / "run").glob("round-*"):
        record, report = folder / "round.json", folder / "round.report.json"
        known = json.loads(record.read_text())
        assert known.pop("rollout.sft_teacher") is None
        record.write_text(json.dumps(known))
        made_from = {"made_from": canonical_hash(known)}
        report.write_text(json.dumps({**json.loads(report.read_text()), **made_from}))

    monkeypatch.setattr(train, "run", None)
    assert run(world, tmp_path / "run").figures["rounds"] == 2


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("rollout", marks=pytest.mark.slow),
        "precompute",
        pytest.param("train", marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_before_any_stage_of_a_round_ends_with_the_same_bytes(
    world, finished, tmp_path, monkeypatch, stage
):
    module = getattr(rounds, stage)
    whole, calls = module.run, []

    def dies_in_the_second_round(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "run", dies_in_the_second_round)
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()
    run(world, tmp_path / "run")
    assert weights(tmp_path / "run" / "student") == weights(finished[0] / "student")


def test_other_settings_in_the_same_folder_are_refused_by_name(world, finished):
    with pytest.raises(
        OutputError, match=r"round-000 was made under other settings \(rollout\.sampling differ"
    ):
        run(world, finished[0], rollout={"sampling": {"max_tokens": 9, "n": 2}})


def test_a_setting_that_was_refused_can_be_mended_in_the_same_folder(world, tmp_path):
    with pytest.raises(ConfigError, match="top_k is 99"):
        run(world, tmp_path / "run", precompute={"top_k": 99}, rounds={"steps": 1, "prompts_per_round": 2})
    report = run(world, tmp_path / "run", rounds={"steps": 1, "prompts_per_round": 2})
    assert report.figures["steps"] == 1


def test_settings_that_decide_nothing_may_change_between_runs(world, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    changed = {**settings(world, "x")["train"], "micro_batch_tokens": 4096}
    report = run(world, tmp_path / "run", train=changed)
    assert report.figures["rounds"] == 2


def test_a_stale_cache_ends_the_round_and_the_steps_are_made_up_in_further_rounds(world, tmp_path):
    limits = {"max_log_ratio": 1e-4, "max_chi2": 1e-4}
    changed = {**settings(world, "x")["train"], "steps": 6, "staleness": limits, "optimizer": {"lr": 1e-2}}
    report = run(world, tmp_path / "run", train=changed, rounds={"steps": 6, "prompts_per_round": 4})
    assert report.figures["steps"] == 6
    assert 2 < report.rows[0]["steps"] < 6
    assert report.figures["rounds"] > 1


def test_a_run_that_stopped_when_stale_stays_stopped_until_the_limit_is_lifted(world, tmp_path):
    def fit(stops):
        plain = settings(world, "x")["train"]
        limits = {"max_chi2": 1e-4, "max_log_ratio": 1e-4, "stop_when_stale": stops}
        asked = {**plain, "steps": 5, "optimizer": {"lr": 1e-2}, "staleness": limits}
        return train.run(
            TrainConfig(cache=world.cache, student=str(world.sft / "student"), out=tmp_path / "t", **asked)
        )

    stopped = fit(True)
    assert 1 < stopped.figures["steps"] < 5
    assert any("went stale" in note for note in stopped.notes)
    assert fit(True).figures["steps"] == stopped.figures["steps"]
    assert fit(False).figures["steps"] == 5


def test_rounds_continue_where_the_cache_is_stale_unless_they_are_told_not_to_stop(world, tmp_path):
    config = build_run(settings(world, tmp_path))
    assert planned_round(config, config.rounds, 0, 0).train.staleness.stop_when_stale
    changed = {**settings(world, "x")["train"], "staleness": {"stop_when_stale": False}}
    config = build_run(settings(world, tmp_path, train=changed))
    assert not planned_round(config, config.rounds, 0, 0).train.staleness.stop_when_stale


def test_the_optimiser_is_carried_from_round_to_round_unless_it_is_fresh(world, finished, tmp_path):
    def moments(out):
        state = load_file(out / "round-001/train/checkpoints/step-000002/optimizer.safetensors")
        return next(value for name, value in state.items() if name.startswith("step/"))

    run(world, tmp_path / "run", rounds={"steps": 4, "prompts_per_round": 4, "optimizer": "fresh"})
    assert moments(finished[0]) == torch.tensor(4.0)
    assert moments(tmp_path / "run") == torch.tensor(2.0)
    assert weights(finished[0] / "round-000/train/student") == weights(
        tmp_path / "run/round-000/train/student"
    )
    assert weights(finished[0] / "student") != weights(tmp_path / "run" / "student")


def test_only_the_last_rounds_checkpoints_stay(finished):
    out, _ = finished
    assert not (out / "round-000/train/checkpoints").exists()
    assert (out / "round-001/train/checkpoints").is_dir()


def test_an_optimiser_of_another_student_is_refused(world, finished, tmp_path):
    asked = {**settings(world, "x")["train"], "continue_from": finished[0] / "round-001/train"}
    with pytest.raises(TrainingError, match="which made another student"):
        train.run(
            TrainConfig(cache=world.cache, student=str(world.sft / "student"), out=tmp_path / "t", **asked)
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 3])
def test_rounds_of_any_length_have_the_learning_rates_of_one_run(world, tmp_path, schedule, steps):
    whole = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=2)
    changed = {**settings(world, "x")["train"], "steps": steps}
    changed["optimizer"] = {"lr": 1.0, "schedule": schedule, "warmup_steps": 2}
    config = build_run(settings(world, tmp_path, train=changed, rounds={"steps": 7}))
    found = []
    while len(found) < 7:
        one = planned_round(config, config.rounds, len(found) // steps, len(found)).train
        found += [learning_rate(one.optimizer, step, one.steps) for step in range(one.steps)]
    np.testing.assert_allclose(found, [learning_rate(whole, step, 7) for step in range(7)])


def test_live_rounds_of_one_step_load_the_teacher_once(world, tmp_path):
    from lightopd.engines.kinds import load_engine

    loaded = []

    def counting(engine, model):
        loaded.append(model.path)
        return load_engine(engine, model)

    live = {"steps": 3, "prompts_per_round": 2, "keep_teacher": True}
    changed = {**settings(world, "x")["train"], "steps": 1}
    config = build_run(settings(world, tmp_path / "run", train=changed, rounds=live))
    report = rounds.run(config, load=counting)
    assert report.figures["rounds"] == 3
    assert loaded.count(str(world.teacher)) == 1
    assert len(loaded) == 4
    assert all(row["ess"] == pytest.approx(1, abs=1e-6) for row in report.rows)


def test_kept_engines_are_freed_at_the_end():
    class Engine:
        is_closed = False

        def close(self):
            self.is_closed = True

    from lightopd.schemas.configs import HfEngine, ModelConfig

    engine = Engine()
    with KeptEngines(lambda *_: engine) as kept:
        kept(HfEngine(), ModelConfig(path="a")).close()
        assert not engine.is_closed
    assert engine.is_closed


def test_a_dry_run_speaks_of_every_step_and_says_what_the_others_wait_for(world, finished, tmp_path):
    def dry(out, **changes):
        told = []
        report = pipeline.run(build_run(settings(world, out, **changes)), dry_run=True, told=told.append)
        return report, told

    report, told = dry(tmp_path / "new", rounds=None)
    assert [one.stage for one in told] == ["rollout", "precompute", "train"]
    assert told[1].notes == ("dry run: waits for rollout",)
    assert "1 steps can start now: rollout" in report.notes[0]
    assert [one.stage for one in dry(tmp_path / "new")[1]] == ["rollout", "rounds"]
    assert not (tmp_path / "new").exists()
    shutil.copytree(finished[0] / "round-000", tmp_path / "run")
    once = {"sampling": {"max_tokens": 8, "n": 2}, "shard_rollouts": 4}
    _, told = dry(tmp_path / "run", rounds=None, rollout=once)
    assert told[2].figures["rollouts"] == 8


def test_a_finished_evaluation_is_not_measured_again(world, tmp_path, monkeypatch):
    asked = {"model": world.base, "teacher": world.teacher, "prompts": world.root / "prompts.jsonl"}
    config = load_stage("eval", [], ["sampling.max_tokens=4"], {**asked, "out": tmp_path / "eval"})
    first = evaluate.run(config)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "divergence", None)
        assert evaluate.run(config) == first
    other = save_model(tmp_path / "other", 5)
    again = evaluate.run(
        config.model_copy(update={"teacher": config.teacher.model_copy(update={"path": str(other)})})
    )
    assert again.figures["reverse_kl_nats"] != first.figures["reverse_kl_nats"]
    shutil.rmtree(tmp_path / "eval" / "answers")
    assert evaluate.run(config).figures["reverse_kl_nats"] == first.figures["reverse_kl_nats"]
    assert (tmp_path / "eval" / "answers").is_dir()


def test_a_finished_round_is_not_kept_where_another_student_would_have_been_chosen(world, tmp_path):
    chosen = {"held_out": 2, "held_out_every": 1, "best": {"metric": "held_out"}}
    run(world, tmp_path / "run", train=chosen)
    for name, change in {"best": None, "held_out_every": 2}.items():
        with pytest.raises(OutputError, match=r"\(train\.best with held_out_every and accuracy differ\)"):
            run(world, tmp_path / "run", train=chosen | {name: change})


def test_averaged_weights_are_refused_in_rounds_where_they_are_loaded(world, tmp_path):
    with pytest.raises(ConfigError, match="take ema_decay out of train"):
        build_run(settings(world, tmp_path, train={"ema_decay": 0.9}))


def test_rounds_on_several_devices_are_refused_where_they_are_loaded(world, tmp_path):
    with pytest.raises(ConfigError, match="rounds and phases train on one device"):
        build_run(settings(world, tmp_path, train={"devices": 2}))


def adapted(world, out, **changes):
    plain = settings(world, "x")["train"]
    return run(world, out, train={**plain, "adapter": {"rank": 2, **changes.pop("adapter", {})}}, **changes)


def test_rounds_train_one_adapter_on_one_base(world, tmp_path):
    report = adapted(world, tmp_path / "run")
    made = [tmp_path / "run" / name / "train/student" for name in ("round-000", "round-001")]
    first, second = (lineage(folder) for folder in made)
    assert first.student.weights == first.base.weights
    assert (second.base.identity, second.student.weights) == (first.student.identity, first.base.weights)
    assert second.student.adapter != first.student.adapter
    assert second.sft == lineage(world.sft / "student").sft
    moments = load_file(tmp_path / "run/round-001/train/checkpoints/step-000002/optimizer.safetensors")
    assert {float(value) for name, value in moments.items() if name.startswith("step/")} == {4.0}
    assert report.notes[0].startswith(f"the student is an adapter on {world.sft / 'student'}: ")


def test_the_adapter_that_rounds_made_is_evaluated_and_samples_as_the_pair_it_belongs_to(world, tmp_path):
    adapted(world, tmp_path / "run", rounds={"steps": 1, "prompts_per_round": 2})
    adapter = f"adapter={tmp_path / 'run/student'}"
    base, prompts = world.sft / "student", world.root / "prompts.jsonl"
    short = ["sampling.max_tokens=4", "prompts.limit=2"]
    asked = {"prompts": prompts, "model": base, "out": tmp_path / "eval"}
    assert evaluate.run(load_stage("eval", [], [f"model.{adapter}", *short], asked)).figures["rollouts"] == 2
    asked = {"prompts": prompts, "student": base, "cache": tmp_path / "cache"}
    rollout.run(load_stage("rollout", [], [f"student.{adapter}", *short], asked))
    sampler = open_cache(tmp_path / "cache", signals=()).manifest.sampler
    assert sampler.identity == lineage(tmp_path / "run/student").student.identity


def test_rounds_that_merge_their_adapter_leave_a_plain_student(world, tmp_path):
    fresh = {"steps": 4, "prompts_per_round": 4, "optimizer": "fresh"}
    report = adapted(world, tmp_path / "run", adapter={"merge": True}, rounds=fresh)
    first, second = (lineage(tmp_path / "run" / f"round-00{i}" / "train/student") for i in (0, 1))
    assert (first.student.adapter, second.student.adapter) == (None, None)
    assert second.base.weights == first.student.weights != second.student.weights
    assert report.notes == ()
