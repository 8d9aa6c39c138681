"""What was begun when configs were spelled in an earlier way is resumed under it, to the same bytes."""

import json

import pytest
from tiny_models import save_model, write_prompts

from lightopd.lineage import fingerprint
from lightopd.lineage.architecture import spelled_out
from lightopd.training.measures.metrics_file import read_metrics


def scaled(folder, seed):
    """A model whose rotary embedding names its kind twice, as files saved again do."""
    save_model(folder, seed)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("part-*"))}


@pytest.fixture
def stages(tmp_path, lightopd):
    """Runs the three stages and expects them to end well."""
    student, teacher = scaled(tmp_path / "student", 0), scaled(tmp_path / "teacher", 1)
    prompts, cache = write_prompts(tmp_path / "prompts.jsonl", 6), tmp_path / "cache"
    sampled = ["--student", student, "--cache", cache]
    small = ["--set", "sampling.max_tokens=6", "--set", "shard_rollouts=3", "--prompts", prompts]

    def run(steps, *more):
        for command in (
            ["rollout", *sampled, *small, "--sft-teacher", teacher],
            ["precompute", "--teacher", teacher, "--cache", cache, "--top-k", 3],
            ["train", *sampled, "--out", tmp_path / "out", "--steps", steps, "--batch", 3, *more],
        ):
            code, _, err = lightopd(*command)
            assert code == 0, err

    return run


def test_a_cache_and_a_training_that_were_begun_under_it_are_resumed(tmp_path, stages, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(fingerprint, "architecture", spelled_out)
        stages(1)
    before = files(tmp_path / "cache")
    for file in before:
        if "part-00001" in file.name:
            file.unlink()
    stages(2)
    assert files(tmp_path / "cache") == before
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.csv")] == [1, 2]
    stages(2)


def test_another_scaling_is_still_refused(tmp_path, stages, lightopd):
    stages(1)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["rope_parameters"]["factor"] = 4.0
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    code, _, err = lightopd(
        "train", "--student", tmp_path / "student", "--cache", tmp_path / "cache", "--out", tmp_path / "out"
    )
    assert code == 4
    assert "this student is" in err
