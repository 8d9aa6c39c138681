"""kill -9 at ten random moments of one training run, each time the same call again."""

import json
import random
import time

import pytest
from lives import life, nursery

from lightopd.training.measures.metrics_file import read_metrics

STEPS = 40
SETTINGS = {
    "steps": STEPS,
    "batch_sequences": 4,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-3},
    "checkpoint_every": 2,
    "held_out": 4,
    "held_out_every": 3,
    "ema_decay": 0.8,
    "best": {"metric": "held_out"},
}
PREPARE = """
from pathlib import Path
from lightopd.cache.store import open_cache
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.fit import fit
cache, student, settings = sys.argv[1:]
def live(out):
    finetune = FinetuneConfig.model_validate_json(settings)
    fit(open_cache(Path(cache)), ModelConfig(path=student), Path(out), finetune, ObjectiveConfig())
"""


@pytest.fixture
def training(make_cache, student_folder, tmp_path):
    """The process whose lives are calls of `fit` into the folder that a line names."""
    cache = make_cache(tmp_path / "cache")
    with nursery(PREPARE, cache.path, student_folder, json.dumps(SETTINGS)) as process:
        yield process


def numbers(out):
    clocked = ("seconds", "tokens_per_second")
    rows = read_metrics(out / "metrics.csv")
    return [[repr(value) for name, value in row.items() if name not in clocked] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_at_random_moments_change_no_bit_of_weights_or_curve(training, tmp_path, seed):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert life(training, whole) == 0
    chance = random.Random(seed)
    moments = [moment + chance.randrange(2) for moment in sorted(chance.sample(range(STEPS - 12), 10))]
    assert len(set(moments)) > 5, "the moments differ"
    for moment in moments:
        wait_s = chance.uniform(0, 0.005)

        def is_due(moment=moment, wait_s=wait_s):
            if len(read_metrics(cut / "metrics.csv")) < moment:
                return False
            time.sleep(wait_s)  # into the next step, or the checkpoint
            return True

        assert life(training, cut, is_due) == -9
    assert life(training, cut) == 0
    weights = [(out / "student" / "model.safetensors").read_bytes() for out in (whole, cut)]
    assert weights[0] == weights[1]
    assert numbers(cut) == numbers(whole)
    assert [int(row["step"]) for row in read_metrics(cut / "metrics.csv")] == [*range(1, STEPS + 1)]


@pytest.mark.slow
def test_a_killed_run_is_resumed(make_cache, student_folder, tmp_path, device):
    cache, whole, cut = make_cache(tmp_path / "cache"), tmp_path / "whole", tmp_path / "cut"
    settings = json.dumps(SETTINGS | {"accelerator": {"cpu": "cpu", "cuda": "gpu"}[device]})

    def is_due():
        time.sleep(0.01)
        return len(read_metrics(cut / "metrics.csv")) >= STEPS // 2

    with nursery(PREPARE, cache.path, student_folder, settings) as process:
        assert life(process, whole) == 0
        assert life(process, cut, is_due) == -9
        assert life(process, cut) == 0
    rows, expected = read_metrics(cut / "metrics.csv"), read_metrics(whole / "metrics.csv")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    # Sums on a GPU are not made in one order.
    assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], abs=0.0 if device == "cpu" else 1e-3)
