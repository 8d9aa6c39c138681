"""Adapters: only they are trained, a step is the dense one's shadow, and what is written is read again."""

import json

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightopd.errors import ConfigError, TrainingError
from lightopd.models.load import load_model
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.fit import fit
from lightopd.training.measures.metrics_file import read_metrics
from lightopd.training.optimizer import make_optimizer
from lightopd.training.student.adapters import lasting_name, load_student, trained_student

CALM = OptimizerConfig(lr=1e-3, eps=1e-3)
LORA = {"rank": 4, "alpha": 8}
IDS_BT = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture
def cache(make_cache, tmp_path):
    return make_cache(tmp_path / "cache")


@pytest.fixture
def train(cache, student_folder, tmp_path):
    """Function that trains an adapter into a folder of the test."""

    def run(out="out", student=student_folder, objective=(), continue_from=None, **settings):
        defaults = {"steps": 4, "batch_sequences": 8, "micro_batch_tokens": 60, "optimizer": CALM}
        finetune = FinetuneConfig(**(defaults | {"checkpoint_every": 2, "adapter": LORA} | settings))
        student = student if isinstance(student, ModelConfig) else ModelConfig(path=str(student))
        return fit(
            cache,
            student,
            tmp_path / out,
            finetune,
            ObjectiveConfig(**dict(objective)),
            continue_from=continue_from,
        )

    return run


def adapter_of(result):
    return load_file(result.student / "adapter_model.safetensors")


def losses(result):
    return [row["loss"] for row in read_metrics(result.student.parent / "metrics.csv")]


def same_bits(one, other):
    left, right = adapter_of(one), adapter_of(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def logits_of(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BT).logits


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_the_adapter_is_trained_and_in_the_optimiser(student_folder, kind):
    finetune = FinetuneConfig(adapter={"kind": kind, **LORA})
    model = load_student(ModelConfig(path=str(student_folder)), finetune, None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("magnitude" in name for name in trained) == (kind == "dora")
    optimizer = make_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


def test_a_step_is_that_of_a_dense_model_by_the_chain_rule(train, student_folder):
    """With W = W0 + (alpha / r) B A and B = 0 the gradient of B is (alpha / r) G A^T, that of A zero."""
    plain = {"optimizer": OptimizerConfig(lr=1e-3, eps=1e-3, weight_decay=0, clip_norm=None)}
    plain |= {"steps": 1, "micro_batch_tokens": 10_000}
    target = {"target_modules": ("down_proj",), **LORA}
    result = train("adapter", adapter=target, **plain)
    dense = train("dense", adapter=None, **plain)
    before, after = (
        load_file(student_folder / "model.safetensors"),
        load_file(dense.student / "model.safetensors"),
    )
    assert result.metrics["loss"] == dense.metrics["loss"]
    name = "model.layers.1.mlp.down_proj"
    moved = (after[f"{name}.weight"] - before[f"{name}.weight"]).double() / -1e-3
    gradient_DI = 1e-3 * moved / (1 - moved.abs())  # the first step of Adam is lr g / (|g| + eps)
    tensors = adapter_of(result)
    first_RI = tensors[f"base_model.model.{name}.lora_A.weight"].double()
    expected_DR = 2 * gradient_DI @ first_RI.T
    expected_DR = -1e-3 * expected_DR / (expected_DR.abs() + 1e-3)
    found_DR = tensors[f"base_model.model.{name}.lora_B.weight"].double()
    assert found_DR.abs().max() > 1e-4
    torch.testing.assert_close(found_DR, expected_DR, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(train, tmp_path, kind):
    settings = {"adapter": {"kind": kind, **LORA}, "gradient_checkpointing": kind == "dora"}
    whole = train("whole", **settings)
    train("cut", steps=2, **settings)
    again = train("cut", **settings)
    assert losses(again) == losses(whole)
    assert same_bits(again, whole)
    names = {path.name for path in (tmp_path / "cut" / "checkpoints" / "step-000002").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_merged_folder_says_what_the_adapter_says(train, student_folder, kind):
    adapter = {"kind": kind, **LORA}
    own = logits_of(student_folder, train(adapter=adapter).student)
    merged = train(adapter={**adapter, "merge": True})
    names = {path.name for path in merged.student.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    torch.testing.assert_close(logits_of(merged.student), own, rtol=1e-5, atol=1e-5)
    assert (own - logits_of(student_folder)).abs().max() > 1e-4


def test_the_adapter_begins_from_the_seed_and_random_numbers_go_on_as_before(student_folder):
    def drawn(seed):
        finetune = FinetuneConfig(adapter=LORA, seed=seed)
        model = load_student(ModelConfig(path=str(student_folder)), finetune, None)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    state = torch.get_rng_state()
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_student_with_an_adapter_goes_on_with_it(train, student_folder):
    first = train("first")
    student = ModelConfig(path=str(student_folder), adapter=first.student)
    assert trained_student(ModelConfig(path=str(student_folder)), first.student) == student
    second = train("second", student=student, steps=1, optimizer=OptimizerConfig(lr=1e-12, weight_decay=0))
    for name, tensor in adapter_of(first).items():
        torch.testing.assert_close(adapter_of(second)[name], tensor, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match=r"rank is 2, there 4; alpha is 32, there 8; set these"):
        train("third", student=student, adapter={"rank": 2})


def test_an_adapter_of_other_settings_is_refused_and_merging_later_is_not(train):
    train(steps=2)
    with pytest.raises(TrainingError, match=r"adapter.rank is 2, there it was 4"):
        train(adapter={**LORA, "rank": 2})
    with pytest.raises(TrainingError, match=r"adapter.alpha is null, there it was 8"):
        train(adapter=None)
    assert (train(steps=2, adapter={**LORA, "merge": True}).student / "model.safetensors").exists()


def test_an_adapted_output_layer_is_refused_tied_or_not(train, tmp_path):
    with pytest.raises(ConfigError, match="changes the output layer, or the embedding that is tied to it"):
        train("tied", adapter={"target_modules": ("embed_tokens",)})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "untied")
    with pytest.raises(ConfigError, match=r"leave it out of adapter\.target_modules"):
        train("untied", student=tmp_path / "untied", adapter={"target_modules": ("lm_head", "q_proj")})


def test_modules_that_the_student_does_not_have_and_jumps_are_refused(train):
    with pytest.raises(ConfigError, match=r"target_modules \('nothing',\) does not fit the student"):
        train(adapter={"target_modules": ("nothing",)})
    with pytest.raises(ConfigError, match=r"leave out adapter, or objective\.jump"):
        train(objective={"jump": {}}, held_out=4)


def test_an_adapter_without_peft_names_what_to_install(train, monkeypatch):
    monkeypatch.setattr("lightopd.training.student.adapters.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lightopd\[adapters\]"):
        train()


def test_packed_rows_train_the_adapter_that_padded_rows_train(train):
    padded, packed = train("padded"), train("packed", layout="packed")
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    for name, tensor in adapter_of(padded).items():
        torch.testing.assert_close(adapter_of(packed)[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_moments_of_an_adapter_that_was_merged_are_not_carried(train, tmp_path):
    merged = train("first", steps=1, adapter={**LORA, "merge": True}).student
    with pytest.raises(TrainingError, match=r"set adapter\.merge to false there"):
        train("second", student=merged, steps=1, continue_from=tmp_path / "first")


def test_an_adapter_names_its_base_from_every_working_folder(train, student_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(student_folder.parent)
    made = train(student=ModelConfig(path=student_folder.name))
    monkeypatch.chdir(tmp_path)
    named = json.loads((made.student / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(student_folder.resolve())
    given = ModelConfig(path=str(made.student))
    assert (given.path, given.adapter) == (named, made.student)
    whole = ModelConfig(path=named, adapter=made.student)
    with torch.no_grad():
        one, other = (load_model(model, "cpu")(input_ids=IDS_BT).logits for model in (given, whole))
    assert torch.equal(one, other)


def test_an_adapter_of_a_hub_model_names_its_repository():
    snapshot = "/home/me/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2/snapshots/1a2b"
    assert lasting_name(snapshot, is_folder=True) == "HuggingFaceTB/SmolLM2"
    assert lasting_name("HuggingFaceTB/SmolLM2", is_folder=False) == "HuggingFaceTB/SmolLM2"


@pytest.mark.parametrize("base", [None, 3, "/gone/model"])
def test_an_adapter_without_its_base_says_how_to_give_it(tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ValidationError, match="give the base model as the path and this folder as adapter"):
        ModelConfig(path=str(tmp_path))
    assert ModelConfig(path="base", adapter=tmp_path).path == "base"
