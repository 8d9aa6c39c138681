"""kill -9 at ten random moments of one training run, each time the same call again."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from lightopd.training.metrics import read_metrics

STEPS = 30
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
# Importing takes longer than the run: every life is a fork of a process that has imported and done nothing.
NURSERY = """
import os, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from lightopd.cache.store import open_cache
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives import ObjectiveConfig
from lightopd.training.fit import fit
cache, student, settings = sys.argv[1:]
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            finetune = FinetuneConfig.model_validate_json(settings)
            student = ModelConfig(path=student)
            fit(open_cache(Path(cache)), student, Path(line.strip()), finetune, ObjectiveConfig())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def nursery(make_cache, student_folder, tmp_path):
    """The process that gives birth to lives, one for each line it reads."""
    cache = make_cache(tmp_path / "cache")
    words = [sys.executable, "-c", NURSERY, cache.path, student_folder, json.dumps(SETTINGS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*map(str, words)], env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


def live(nursery, out, until=lambda: False):
    """One call of `fit` in a process of its own, killed as soon as the condition holds; its exit code."""
    nursery.stdin.write(f"{out}\n")
    nursery.stdin.flush()
    pid = int(nursery.stdout.readline())
    while not until():
        if is_gone(pid):
            break
        time.sleep(0.001)
    else:
        os.kill(pid, 9)
    return int(nursery.stdout.readline())


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def numbers(out):
    clocked = ("seconds", "tokens_per_second")
    rows = read_metrics(out / "metrics.csv")
    return [[repr(value) for name, value in row.items() if name not in clocked] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_ten_kills_at_random_moments_change_no_bit_of_weights_or_curve(nursery, tmp_path, seed):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert live(nursery, whole) == 0
    chance = random.Random(seed)
    steps_at_death = []
    for moment in sorted(chance.sample(range(STEPS - 2), 10)):
        wait_s = chance.uniform(0, 0.06)

        def is_due(moment=moment, wait_s=wait_s):
            if len(read_metrics(cut / "metrics.csv")) < moment:
                return False
            time.sleep(wait_s)  # into the next step, or the checkpoint
            return True

        assert live(nursery, cut, is_due) == -9
        steps_at_death.append(len(read_metrics(cut / "metrics.csv")))
    assert live(nursery, cut) == 0
    assert len(set(steps_at_death)) > 5, "the moments differ"
    weights = [(out / "student" / "model.safetensors").read_bytes() for out in (whole, cut)]
    assert weights[0] == weights[1]
    assert numbers(cut) == numbers(whole)
    assert [int(row["step"]) for row in read_metrics(cut / "metrics.csv")] == [*range(1, STEPS + 1)]
