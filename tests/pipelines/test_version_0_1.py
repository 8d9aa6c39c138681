"""A cache and a checkpoint that lightopd 0.1.0 wrote open, verify, resume and train."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lightopd.cache.reader import read_shard_columns
from lightopd.cache.store import content_id, open_cache
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.training.measures.metrics_file import read_metrics

WRITTEN = Path(__file__).parents[1] / "fixtures" / "version_0_1"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy, and the folder that its paths start from."""
    shutil.copytree(WRITTEN, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("part-*"))}


def test_it_opens_and_verifies_under_the_names_it_was_given(old, lightopd):
    cache = open_cache(old / "cache")
    assert (cache.manifest.schema_version, sorted(cache.signals)) == (1, ["hint", "teacher"])
    state = json.loads((old / "run/checkpoints/step-000002/trainer_state.json").read_text())
    assert content_id(cache, ["teacher"]) == state["recipe"]["cache"]
    assert lightopd("verify", "cache")[0] == 0


def test_its_rollouts_are_read_without_the_columns_that_came_later(old):
    columns = read_shard_columns(open_cache(old / "cache"), 0)
    assert columns.behavior_logprobs_N is columns.logprobs_N  # drawn at temperature 1 from all tokens


def test_sql_shows_the_columns_that_came_later_as_null(old, lightopd):
    views = "SELECT count(*) AS n, count(logprob_behavior) AS known FROM tokens"
    code, out, _ = lightopd("sql", "cache", views, "--json")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    assert (row[0] > 0, row[1]) == (True, 0)


def test_every_stage_finds_its_shards_done(old, lightopd):
    before = files(old / "cache")
    rollout = ["--student", "sft/student", "--prompts", "prompts.jsonl", "--set", "sampling.n=2"]
    small = ["--set", "sampling.max_tokens=8", "--set", "shard_rollouts=4"]
    assert lightopd("rollout", "--cache", "cache", *rollout, *small)[0] == 0
    assert lightopd("precompute", "-c", "cache/signals/teacher/precompute.yaml")[0] == 0
    assert lightopd("precompute", "-c", "cache/signals/hint/precompute.yaml")[0] == 0
    assert files(old / "cache") == before


def test_a_shard_that_is_gone_is_made_again(old, lightopd):
    table = open_cache(old / "cache", signals=())
    for part in ("part-00001.parquet", "part-00001.json"):
        (old / "cache/signals/teacher" / part).unlink()
    assert lightopd("precompute", "-c", "cache/signals/teacher/precompute.yaml")[0] == 0
    assert open_cache(old / "cache").manifest == table.manifest
    assert lightopd("verify", "cache")[0] == 0


def test_training_resumes_from_its_checkpoint_to_the_same_losses(old, lightopd):
    undisturbed = read_metrics(old / "run/metrics.csv")
    code, _, err = lightopd("train", "-c", "run/train.yaml")
    assert code == 0, err
    resumed = read_metrics(old / "run/metrics.csv")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    for before, now in zip(undisturbed, resumed, strict=True):
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-6)
        assert now["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5)


def test_a_run_whose_settings_leave_the_objective_out_is_refused_unless_it_is_named(old, lightopd):
    settings = yaml.safe_load((old / "run/train.yaml").read_text())
    (old / "bare.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "objective"}))
    before = (old / "run/train.yaml").read_bytes()
    code, _, err = lightopd("train", "-c", "bare.yaml")
    assert code == 8
    assert 'objective.terms.0.target.kind is "divergence", there it was "log_ratio"' in err
    assert (old / "run/train.yaml").read_bytes() == before
    assert lightopd("train", "-c", "bare.yaml", "--set", "objective.target=log_ratio")[0] == 0


def test_a_new_run_trains_on_the_old_cache_beside_a_new_signal(old, lightopd):
    scored = ["--cache", "cache", "--teacher", "teacher", "--signal", "again", "--set", "top_k=4"]
    assert lightopd("precompute", *scored)[0] == 0
    assert open_cache(old / "cache").signals["again"].manifest.schema_version == SCHEMA_VERSION
    wanted = ["--cache", "cache", "--student", "sft/student", "--out", "new", "--steps", "1"]
    assert lightopd("train", *wanted)[0] == 0
    assert lightopd("verify", "cache")[0] == 0
