"""kill -9 at random moments of a run of rounds, each time the same command again: the same bytes."""

import json
import random
import shutil
import time

import pytest
from lives import life, nursery

from lightopd.training.measures.metrics_file import read_metrics

PREPARE = """
import transformers.models.qwen3.modeling_qwen3
from lightopd.config import load_run
from lightopd.pipelines import run as pipeline
def live(file):
    pipeline.run(load_run([file], [], {}))
"""
ROUNDS = 3
KILLS = 12
# What a round leaves behind, in order; a life is killed a little after one of them is there.
LANDMARKS = (
    "cache/lightopd.json",
    "cache/rollouts/part-00000.json",
    "cache/rollouts/part-00002.json",
    "cache/rollout.report.json",
    "cache/signals/teacher/part-00000.json",
    "cache/signals/teacher/part-00002.json",
    "cache/signals/teacher/precompute.report.json",
    "train/metrics.csv",
    "train/checkpoints/step-000001",
    "train/checkpoints/step-000002",
    "train/student",
    "train/train.report.json",
    "eval/answers/rollouts/part-00000.json",
    "eval/eval.report.json",
    "round.json",
    "round.report.json",
)
# They hold seconds, or are derived; the rest of a run is the same to the last byte.
CLOCKED = ("*.report.json", "journal.jsonl", "metrics.csv", "index.duckdb")


@pytest.fixture(scope="module")
def living():
    with nursery(PREPARE) as process:
        yield process


def write_run(world, folder, **train):
    """The file of a run into `folder`/run: three rounds of two steps, three shards in each stage."""
    plain = {
        "out": str(folder / "run"),
        "teacher": str(world.teacher),
        "student": str(world.sft / "student"),
        "prompts": {"path": str(world.root / "prompts.jsonl")},
        "eval_prompts": {"path": str(world.root / "prompts.jsonl"), "limit": 3},
        "rollout": {"sampling": {"max_tokens": 8, "n": 2}, "shard_rollouts": 4},
        "precompute": {"top_k": 4},
        "train": {
            "steps": 2,
            "batch_sequences": 6,
            "checkpoint_every": 1,
            "optimizer": {"lr": 1e-3},
            **train,
        },
        "eval": {"sampling": {"max_tokens": 6}, "shard_rollouts": 2},
        "rounds": {"steps": 2 * ROUNDS, "prompts_per_round": 6},
    }
    file = folder / "run.json"
    file.write_text(json.dumps(plain))
    return file


def contents(out):
    """Bytes of every file of a run that tells no time, and the numbers of those that do."""
    files = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    found = {name: p.read_bytes() for name, p in files.items() if not any(map(p.match, CLOCKED))}
    for name, path in files.items():
        if path.name == "metrics.csv":
            rows = read_metrics(path)
            found[name] = [{k: repr(v) for k, v in row.items() if "second" not in k} for row in rows]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "train"), [(0, {}), (1, {"adapter": {"rank": 2}})])
def test_kills_at_random_moments_of_rounds_change_no_byte(living, world, tmp_path, seed, train):
    file, out = write_run(world, tmp_path, **train), tmp_path / "run"
    assert life(living, file) == 0
    whole = contents(out)
    shutil.rmtree(out)  # into the same folder again: lineage names the folders of the rounds
    chance = random.Random(seed)
    marks = [out / f"round-{i:03d}" / name for i in range(ROUNDS) for name in LANDMARKS]
    deaths = []
    for mark in (marks[i] for i in sorted(chance.sample(range(len(marks) - 1), KILLS))):
        wait_s = chance.uniform(0, 0.04)

        def is_due(mark=mark, wait_s=wait_s):
            if not mark.exists():
                return False
            time.sleep(wait_s)  # into what comes next
            return True

        assert life(living, file, is_due) == -9
        deaths.append(sum(mark.exists() for mark in marks))
    assert life(living, file) == 0
    assert len(set(deaths)) > KILLS // 2, "the moments differ"
    found = contents(out)
    assert found.keys() == whole.keys()
    assert [str(name) for name in whole if found[name] != whole[name]] == []
