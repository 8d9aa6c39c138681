"""Merging an adapter leaves the adapted model what it is, or is refused."""

import json

import pytest
import torch
from engine_cases import tiny_model
from peft import LoraConfig, get_peft_model

from lightopd.errors import InputError
from lightopd.models.load import load_model
from lightopd.schemas.configs import ModelConfig

IDS = torch.arange(3, 15)[None]


def adapted(tmp_path, family, **settings):
    """A model with an adapter that changes it, in folders, and the adapted model's log-probabilities."""
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.normal_(0, 0.3)
        logprobs = model(input_ids=IDS).logits.log_softmax(-1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return ModelConfig(path=str(tmp_path / "base"), adapter=tmp_path / "adapter"), logprobs


@pytest.mark.parametrize(
    ("family", "modules"),
    [("llama", ["q_proj", "up_proj"]), ("smollm2", "all-linear"), ("llama", ["lm_head", "v_proj"])],
)
def test_a_merged_adapter_is_the_adapted_model(tmp_path, family, modules):
    model, logprobs = adapted(tmp_path, family, target_modules=modules)
    merged = load_model(model, "cpu")
    torch.testing.assert_close(merged(input_ids=IDS).logits.log_softmax(-1), logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_refused(tmp_path, module):
    model, _ = adapted(tmp_path, "smollm2", target_modules=[module])
    with pytest.raises(InputError, match=r"merging adapter .* nats a token.*tied to the embedding"):
        load_model(model, "cpu")


def test_an_adapter_with_whole_layers_is_refused_for_that_reason(tmp_path):
    model, _ = adapted(tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"modules_to_save \['lm_head'\]"):
        load_model(model, "cpu")


def test_an_adapter_of_other_shapes_is_refused_in_one_line(tmp_path):
    model, _ = adapted(tmp_path, "llama", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 7}))
    with pytest.raises(InputError, match="does not fit the model") as refused:
        load_model(model, "cpu")
    assert "\n" not in str(refused.value)
