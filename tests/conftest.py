"""Shared worlds: tiny models on disk, and a pipeline run once over them."""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if os.environ.get("LIGHTOPD_TEST_GPU") != "1":
    # Before torch is imported: the same tests on every machine, and Triton's kernels in its interpreter.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

import pytest
import torch
from tiny_models import save_model, write_prompts

from lightopd.cli.main import main

NO_GPU = "no GPU here; `make test-gpu` on a machine with one runs it"
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def device(request):
    """Where a test runs: the same body on both."""
    return request.param


@pytest.fixture(autouse=True, scope="session")
def _own_user_cache(tmp_path_factory):
    """Fingerprints of tiny models stay out of the user's cache; one thread is fastest for them."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
    torch.set_num_threads(1)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _interrupts_arrive():
    """A shell makes its background jobs, and all they start, deaf to SIGINT; some tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def _shared_engines_end():
    """vLLM's processes are started by the first test that needs them, and end with the session."""
    yield
    if "vllm_cases" in sys.modules:
        sys.modules["vllm_cases"].close_shared()


@dataclass(frozen=True)
class World:
    """Folders of one small pipeline; read only, tests copy what they change."""

    root: Path

    def __getattr__(self, name):
        return self.root / name


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Teacher, base, prompts.jsonl, sft/, cache/ with signal `teacher`; made by the stages themselves."""
    from lightopd.config import load_stage
    from lightopd.pipelines import precompute, rollout, sft

    root = tmp_path_factory.mktemp("world")
    save_model(root / "teacher", 0)
    save_model(root / "base", 1, layers=1)
    prompts = write_prompts(root / "prompts.jsonl", 12)
    short = ["sampling.max_tokens=10", "shard_rollouts=6"]
    tuning = ["finetune.steps=3", "finetune.batch_sequences=6"]
    teacher, student = root / "teacher", root / "sft" / "student"
    asked = {"teacher": teacher, "student": root / "base", "prompts": prompts, "out": root / "sft"}
    sft.run(load_stage("sft", [], short + tuning, asked))
    asked = {"student": student, "prompts": prompts, "cache": root / "cache"}
    rollout.run(load_stage("rollout", [], [*short, "sampling.n=2"], asked))
    precompute.run(
        load_stage("precompute", [], [], {"cache": root / "cache", "teacher": teacher, "top_k": 4})
    )
    return World(root)


@pytest.fixture
def lightopd(monkeypatch, capsys):
    """Call the command in this process: exit code, stdout, stderr."""
    logger = logging.getLogger("lightopd")
    monkeypatch.setattr(logger, "handlers", [])  # the command's handler goes with the test's stderr
    monkeypatch.setattr(logger, "propagate", True)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lightopd", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call
