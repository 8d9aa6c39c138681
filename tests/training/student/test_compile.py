"""Compiled layers: the plain run to rounding, few graphs, and one line where there is no compiler."""

import json
import os
import subprocess
import sys

import pytest
import torch
from model_families import make_model
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from lightopd.errors import ConfigError, TrainingError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training import module
from lightopd.training.fit import fit
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.student.compile import compile_layers, uncompiled
from lightopd.training.student.training_mode import prepare_student

# Pivots need a pass without gradient, which no layer is compiled for.
OBJECTIVE = {"target": {"kind": "divergence"}, "rollout_weights": [{"kind": "pivots", "threshold": 0.1}]}
SETTINGS = {
    "steps": 3,
    "batch_sequences": 8,
    "micro_batch_tokens": 60,
    "optimizer": {"lr": 1e-4, "eps": 1e-3},
    "held_out": 6,
    "held_out_every": 1,
}


def run(cache, student, out, **settings):
    finetune = FinetuneConfig(**(SETTINGS | settings))
    fit(cache, ModelConfig(path=str(student)), out, finetune, ObjectiveConfig(**OBJECTIVE))


def assert_close_runs(one, other):
    left, right = (read_metrics(folder / "metrics.csv") for folder in (one, other))
    for name in ("loss", "grad_norm", "held_out"):
        assert [row[name] for row in left] == pytest.approx([row[name] for row in right], rel=1e-5, abs=1e-5)
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-5)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_run_is_the_plain_one_and_has_a_graph_for_one_row_and_one_for_several(
    make_cache, student_folder, tmp_path, layout, recompute
):
    cache, settings = make_cache(tmp_path / "cache"), {"layout": layout, "gradient_checkpointing": recompute}
    run(cache, student_folder, tmp_path / "plain", **settings)
    torch._dynamo.reset()
    before = graphs()
    run(cache, student_folder, tmp_path / "compiled", compile=True, **settings)
    assert 1 <= graphs() - before <= 2
    assert_close_runs(tmp_path / "plain", tmp_path / "compiled")


@pytest.mark.slow
def test_a_compiled_mixture_has_the_router_loss_of_the_plain_one(make_cache, tmp_path):
    make_model("Qwen3Moe").save_pretrained(tmp_path / "mixture")
    cache, outs = make_cache(tmp_path / "cache"), [tmp_path / "plain", tmp_path / "compiled"]
    for out in outs:
        run(cache, tmp_path / "mixture", out, router_loss=0.5, compile=out.name == "compiled")
    assert_close_runs(*outs)
    balance = [[row["router_loss"] for row in read_metrics(out / "metrics.csv")] for out in outs]
    assert balance[0] == pytest.approx(balance[1], rel=1e-5)


SCRIPT = """
import sys
from pathlib import Path
from lightopd.cache.store import open_cache
from lightopd.errors import LightopdError
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.fit import fit
cache, student, out, settings, objective = sys.argv[1:]
finetune = FinetuneConfig.model_validate_json(settings)
objective = ObjectiveConfig.model_validate_json(objective)
try:
    fit(open_cache(Path(cache)), ModelConfig(path=student), Path(out), finetune, objective)
except LightopdError as error:
    sys.exit(f"refused: {error}")
"""


def run_script(cache, student, out, environment=(), **settings):
    words = [cache.path, student, out, json.dumps(SETTINGS | settings), json.dumps(OBJECTIVE)]
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **dict(environment)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "recompute"), [("ddp", True), ("fsdp", False)])
def test_two_compiled_processes_give_the_plain_run_of_one(
    make_cache, student_folder, tmp_path, strategy, recompute
):
    cache = make_cache(tmp_path / "cache")
    run(cache, student_folder, tmp_path / "plain")
    shared = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "gradient_checkpointing": recompute}
    done = run_script(cache, student_folder, tmp_path / "compiled", compile=True, **shared)
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "plain", tmp_path / "compiled")


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so_in_one_line(make_cache, student_folder, tmp_path):
    cache, nowhere = make_cache(tmp_path / "cache"), str(tmp_path / "no-such-compiler")
    environment = {"CXX": nowhere, "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = run_script(cache, student_folder, tmp_path / "out", environment, compile=True)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("refused: ")]
    assert "the student cannot be compiled here (InvalidCxxCompiler: No working C++ compiler" in line
    assert line.endswith("or leave compile out")
    assert "Traceback" not in done.stderr


def test_what_the_compiler_says_becomes_one_line(make_cache, student_folder, tmp_path, monkeypatch):
    def fails(*_):
        raise InductorError(InvalidCxxCompiler("g++"), None)

    monkeypatch.setattr(module, "student_tokens", fails)
    with pytest.raises(
        TrainingError, match=r"cannot be compiled here \(.*g\+\+ is not found\.\); .* leave compile out"
    ):
        run(make_cache(tmp_path / "cache"), student_folder, tmp_path / "out")


def test_around_compiled_layers_nothing_is_compiled_and_names_stay():
    plain, student = make_model("Qwen3"), make_model("Qwen3")
    compile_layers(prepare_student(student, gradient_checkpointing=False))
    assert [*student.state_dict()] == [*plain.state_dict()]
    assert all(layer._compiled_call_impl is not None for layer in student.model.layers)
    ids_BT, before = torch.arange(1, 7)[None], graphs()
    with torch.no_grad(), uncompiled(student.eval()):
        said = student.generate(input_ids=ids_BT, max_new_tokens=8, do_sample=False)
    assert said.tolist() == plain.generate(input_ids=ids_BT, max_new_tokens=8, do_sample=False).tolist()
    assert graphs() == before


def test_a_student_whose_layers_are_unknown_is_refused(monkeypatch):
    student = make_model("Qwen3")
    monkeypatch.setattr(student, "_no_split_modules", None)
    with pytest.raises(
        ConfigError, match=r"names no decoder layers of Qwen3ForCausalLM .* leave compile out"
    ):
        compile_layers(student)
