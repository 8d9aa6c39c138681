"""Phases over tiny real models: each with settings of its own, from the student that the one before made."""

import json

import pytest
from run_files import models_of

from lightopd.cache.store import open_cache
from lightopd.config import build_run, load_run, read_yaml
from lightopd.errors import ConfigError, OutputError
from lightopd.inspection.runs import read_runs
from lightopd.pipelines import DEMO, RECIPES
from lightopd.pipelines import run as pipeline
from lightopd.pipelines.methods import find_method
from lightopd.schemas.manifest import StudentLineage
from lightopd.schemas.objectives.objective import ObjectiveConfig

DIVERGENCE = {"target": {"kind": "divergence", "divergence": "reverse_kl", "support": "tail"}}
REWARD = {"target": {"kind": "reward"}, "token_weights": [{"kind": "ppo_clip", "low": 0.2, "high": 0.2}]}


def settings(world, out, **changes):
    """A run file of two phases: a teacher's divergence, then a reward on new rollouts."""
    plain = {
        **models_of(world, out),
        "rollout": {"sampling": {"max_tokens": 6}},
        "precompute": {"top_k": 4},
        "train": {"steps": 1, "batch_sequences": 12, "optimizer": {"lr": 1e-3}},
        "phases": [
            {"name": "dense", "train": {"objective": DIVERGENCE, "steps": 2}},
            {
                "name": "sparse",
                "rollout": {"sampling": {"n": 2}},
                "precompute": None,
                "train": {"objective": REWARD},
            },
        ],
    }
    return plain | changes


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A finished run of two phases; read only."""
    out = tmp_path_factory.mktemp("phases") / "run"
    return out, pipeline.run(build_run(settings(world, out)))


def lineage(folder):
    return StudentLineage.model_validate_json((folder / "lightopd_student.json").read_text())


def test_each_phase_samples_from_the_student_that_the_phase_before_it_made(world, finished):
    out, _ = finished
    first, last = (open_cache(out / name / "cache") for name in ("phase-0-dense", "phase-1-sparse"))
    assert first.manifest.sampler.identity == lineage(world.sft / "student").student.identity
    assert last.manifest.sampler.identity == lineage(out / "phase-0-dense/train/student").student.identity
    assert lineage(out / "student") == lineage(out / "phase-1-sparse/train/student")
    assert lineage(out / "student").sft == lineage(world.sft / "student").sft
    assert lineage(out / "student").overrides == ()


def test_each_phase_has_its_own_settings_and_draws_with_a_seed_of_its_own(finished):
    out, _ = finished
    first, last = (open_cache(out / name / "cache") for name in ("phase-0-dense", "phase-1-sparse"))
    assert (first.manifest.sampling.n, last.manifest.sampling.n) == (1, 2)
    assert (first.manifest.sampling.seed, last.manifest.sampling.seed) == (0, 1)
    assert set(first.signals) == {"teacher"}
    assert not last.signals
    rows = json.loads((out / "phases.report.json").read_text())["rows"]
    assert [(row["phase"], row["steps"]) for row in rows] == [("dense", 2), ("sparse", 1)]
    assert [run.name for run in read_runs([out])] == ["phase-0-dense", "phase-1-sparse"]


def test_finished_phases_are_not_repeated_and_a_changed_one_is_refused_by_its_settings(world, finished):
    out, report = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*")}
    again = pipeline.run(build_run(settings(world, out)))
    assert again.figures.keys() == report.figures.keys()
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("part-*")}
    changed = settings(world, out)
    changed["phases"][0]["train"]["optimizer"] = {"lr": 2e-3}
    with pytest.raises(
        OutputError, match=r"phase-0-dense was made under other settings \(train.optimizer differ\)"
    ):
        pipeline.run(build_run(changed))


def test_a_dry_run_names_every_phase_and_writes_nothing(world, tmp_path):
    told = []
    pipeline.run(build_run(settings(world, tmp_path / "run")), dry_run=True, told=told.append)
    (phases,) = (report for report in told if report.stage == "phases")
    assert phases.notes == ("dry run: nothing was written; dense (2 steps), sparse (1 steps)",)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": {"steps": 2}}, "rounds repeat settings and phases have their own"),
        ({"phases": [{"name": "a"}, {"name": "a"}]}, "two phases have the same name: a, a"),
        ({"phases": [{"name": "a", "train": {"adapter": {}}}]}, "set adapter in train, not in a phase"),
        ({"phases": [{"name": "a", "train": {"devices": 2}}]}, "rounds and phases train on one device"),
        ({"phases": [{"name": "a", "train": {"stepz": 2}}]}, r"section train: .*stepz"),
    ],
)
def test_phases_that_contradict_themselves_are_refused_where_they_are_loaded(
    world, tmp_path, change, message
):
    with pytest.raises(ConfigError, match=message):
        build_run(settings(world, tmp_path / "run", **change))


def test_a_phase_without_the_signal_that_its_loss_reads_is_refused_before_the_first(world, tmp_path):
    plain = settings(world, tmp_path / "run")
    plain["phases"][1]["train"] = {"objective": DIVERGENCE}
    with pytest.raises(ConfigError, match=r"the planned cache cannot serve train's objective: .*teacher"):
        pipeline.run(build_run(plain))
    assert not (tmp_path / "run" / "phase-0-dense").exists()


def test_the_phases_of_sparse_to_dense_have_the_objectives_of_its_recipes():
    dense, sparse = read_yaml("sparse_to_dense", RECIPES)["phases"]
    for phase, name in ((dense, "sparse_to_dense"), (sparse, "zppo")):
        objective = ObjectiveConfig.model_validate(phase["train"]["objective"])
        assert objective == find_method(RECIPES / "methods", name).objective


@pytest.mark.slow
def test_sparse_to_dense_runs_on_the_tiny_task_from_one_command(tmp_path, lightopd):
    small = ["prompts.count=24", "eval_prompts.count=12", "train.steps=2", "train.batch_sequences=24"]
    small += ["sft.prompts.count=64", "sft.finetune.steps=20", "sft.finetune.checkpoint_every=20"]
    files = [word for name in ("demo", "demo_from_base", "sparse_to_dense") for word in ("-c", name)]
    models = ["--teacher", DEMO / "teacher", "--student", DEMO / "base", "--out", tmp_path / "run"]
    code, _, said = lightopd("run", *files, *models, *(word for one in small for word in ("--set", one)))
    assert code == 0, said
    report = json.loads((tmp_path / "run" / "phases.report.json").read_text())
    assert [row["phase"] for row in report["rows"]] == ["dense", "sparse"]
    assert lineage(tmp_path / "run" / "student").sft.proof == "recorded"
    assert load_run(["demo", "sparse_to_dense"], [], {"out": "o", "teacher": "t", "student": "s"}, RECIPES)
