"""Training on signals that keep hidden states, through the command: whole vocabularies, unchanged recipes."""

import json
import shutil

import pytest
import torch
from torch import Tensor

import lightopd
from lightopd.cache.reader import read_shard_columns
from lightopd.cache.store import open_cache
from lightopd.config import load_stage
from lightopd.models.load import load_model
from lightopd.objectives.plain_tensors import loss_from_logits
from lightopd.pipelines import precompute, rollout
from lightopd.schemas.configs import ModelConfig
from lightopd.training.measures.metrics_file import read_metrics

SHORT = ["--set", "batch_sequences=8", "--steps", "1"]


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory):
    """A cache: signal `teacher` keeps hidden states and no top-k, `plain` keeps a top-k; read only."""
    path = tmp_path_factory.mktemp("kept") / "cache"
    asked = {"student": world.sft / "student", "prompts": world.root / "prompts.jsonl", "cache": path}
    sets = ["sampling.max_tokens=14", "sampling.n=4", "shard_rollouts=16"]
    rollout.run(load_stage("rollout", [], sets, asked))
    for extra in ({"keep": "hidden"}, {"signal": "plain", "top_k": 8}):
        precompute.run(load_stage("precompute", [], [], {"cache": path, "teacher": world.teacher, **extra}))
    return path


def objective(target: dict) -> list[str]:
    return ["--set", f"objective.target={json.dumps({'kind': 'divergence', **target})}"]


def first_loss(lightopd, world, cache, out, *arguments) -> float:
    """The loss of the first step, over all rollouts."""
    number = open_cache(cache).num_rollouts
    asked = ["--cache", cache, "--student", world.sft / "student", "--out", out, "--steps", "1"]
    code, _, err = lightopd("train", *asked, "--set", f"batch_sequences={number}", *arguments)
    assert code == 0, err
    (row,) = read_metrics(out / "metrics.csv")
    return row["loss"]


def divergences(world, cache, kind: str) -> float:
    """Mean over rollouts of the mean over tokens, of both models over the whole vocabulary in float64."""
    models = [
        load_model(ModelConfig(path=str(path)), "cpu").eval()
        for path in (world.teacher, world.sft / "student")
    ]
    opened, values = open_cache(cache), []
    for shard in opened.shards:
        columns = read_shard_columns(opened, shard)
        for row in range(len(columns.rollout_ids)):
            prompt = columns.prompt_ids_P[columns.prompt_offsets[row] : columns.prompt_offsets[row + 1]]
            response = columns.response_ids_N[columns.offsets[row] : columns.offsets[row + 1]]
            ids = torch.tensor([[*prompt, *response]])
            logits = [model(ids).logits[0, len(prompt) - 1 : -1].double() for model in models]
            values.append(divergence(kind, *(each.log_softmax(-1) for each in logits)).mean())
    return float(torch.stack(values).mean().detach())


def divergence(kind: str, teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    p, q = (teacher_NV, student_NV) if kind == "forward_kl" else (student_NV, teacher_NV)
    return (p.exp() * (p - q)).sum(1)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_the_first_loss_is_the_divergence_of_the_two_models_over_the_whole_vocabulary(
    lightopd, world, kept, tmp_path, kind
):
    target = objective({"divergence": kind, "tail": "whole"})
    found = first_loss(lightopd, world, kept, tmp_path / "out", *target)
    assert found == pytest.approx(divergences(world, kept, kind), rel=0.02)


def test_a_recipe_trains_unchanged_and_is_measured_on_what_it_holds_out(lightopd, world, kept, tmp_path):
    recipe = ["-c", "methods/f_reverse_kl", "--set", "held_out=8"]
    losses = []
    for name in ("teacher", "plain"):
        out, signal = tmp_path / name, ["--set", f"objective.signal={name}"]
        first_loss(lightopd, world, kept, out, *recipe, *signal, "--set", "batch_sequences=8")
        losses.append(read_metrics(out / "metrics.csv")[0]["held_out"])
    assert 0 < losses[1] < losses[0]  # eight entries and a bucket are a lower bound


@pytest.mark.parametrize("name", ["tip", "vopd", "recommended_topk_reverse_kl"])
@pytest.mark.slow
def test_recipes_that_read_a_support_train_unchanged(lightopd, world, kept, tmp_path, name):
    assert first_loss(lightopd, world, kept, tmp_path / "out", "-c", f"methods/{name}") != 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("gone", "is missing, the head of hidden states in this cache"),
        ("other", "is not the head that signal.json names"),
        ("plain", "signal plain keeps no hidden states, which tail: whole reads"),
    ],
)
def test_a_head_that_is_not_the_signals_is_refused_before_the_first_step(
    lightopd, world, kept, tmp_path, spoil, message
):
    cache = tmp_path / "cache"
    shutil.copytree(kept, cache)
    (head,) = (cache / "heads").glob("*.safetensors")
    if spoil == "gone":
        head.unlink()
    elif spoil == "other":
        head.write_bytes(head.read_bytes()[:-4] + b"\0\0\0\0")
    signal = ["--set", "objective.signal=plain"] if spoil == "plain" else []
    asked = ["--cache", cache, "--student", world.sft / "student", "--out", tmp_path / "out", *SHORT]
    code, _, err = lightopd("train", *asked, *objective({"tail": "whole"}), *signal)
    assert code != 0
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_methods_check_knows_what_hidden_states_serve(lightopd, kept):
    code, out, _ = lightopd("methods", "check", "f_reverse_kl", kept)
    assert code == 0, out


def test_in_python_the_batches_and_the_head_of_a_cache_give_the_loss(world, kept):
    opened = lightopd.open_cache(kept)
    batch = next(opened.batches(4, ["teacher"])).rollouts
    logits_NV = torch.zeros(len(batch.ids_N), open_cache(kept).manifest.vocabulary_size, requires_grad=True)
    whole = {"target": {"kind": "divergence", "tail": "whole"}}
    loss = loss_from_logits(whole, batch, logits_NV, heads={"teacher": opened.head("teacher")})
    loss.value.backward()
    assert float(loss.value) > 0
    assert logits_NV.grad.abs().sum() > 0
