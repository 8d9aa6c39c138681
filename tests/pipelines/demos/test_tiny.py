"""The tiny demo on a device, from the teacher to the trained student."""

import json
import math

import pytest

from lightopd.pipelines.demos import tiny
from lightopd.training.measures.metrics_file import read_metrics


@pytest.mark.slow
def test_the_student_becomes_better(tmp_path, device):
    # Sampling, scoring and training take the GPU where there is one, and the processor elsewhere.
    out = tmp_path / "demo"
    line = tiny.run(out, engine=None, seed=0, from_base=False, told=lambda _: None, shown=lambda *_: None)
    said = json.loads(line)
    assert said["accuracy_after"] > said["accuracy_before"], said
    assert all(math.isfinite(row["loss"]) for row in read_metrics(out / "train" / "metrics.csv"))
