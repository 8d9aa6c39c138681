"""The short form of the torture; `python -P tests/torture --rounds 200` is the long one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHEAP = (
    "rollout,rewrite,precompute,train,eval,join,import,export,repair,index,copy,"
    "push,pull,merge,split,drop-signal"
)
"""Stages of the short form; the long form has sft, run and rounds too, which take several times as long."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, which makes what hurts a process")
def test_thirty_hurt_stages_resume_to_the_bytes_of_undisturbed_ones(tmp_path):
    words = [sys.executable, "-P", HERE, "--rounds", "30", "--seed", "0", "--stages", CHEAP]
    done = subprocess.run([*words, "--folder", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 rounds" in done.stdout
