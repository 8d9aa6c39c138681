"""Loading models and reading their output layer."""

import importlib.util
import json

import pytest
import torch
from engine_cases import CONTEXT, FAMILIES, VOCABULARY, tiny_model
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig, LlamaForCausalLM

from lightopd.errors import ConfigError, EngineError, InputError
from lightopd.models.head import check_head, head_of, last_hidden
from lightopd.models.limits import model_limits
from lightopd.models.load import choose_device, context_length_of, load_model
from lightopd.schemas.configs import ModelConfig

EXPECTED_HEADS = {
    "gemma2": (False, 3.0, 1.0),
    "phi": (True, None, 1.0),
    "granite": (False, None, 2.0),
    "cohere": (False, None, 2.0),
}


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **settings):
    return load_model(ModelConfig(path=str(folder), **settings), "cpu")


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_head_of_every_family_gives_the_models_own_logits(family):
    model = tiny_model(family)
    check_head(model)
    head = head_of(model)
    assert head.weight_VD.shape == (VOCABULARY, 32)
    assert context_length_of(model) == CONTEXT
    found = (head.bias_V is not None, head.softcap, head.temperature)
    assert found == EXPECTED_HEADS.get(family, (False, None, 1.0))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_states_under_the_head_have_the_final_norm(family):
    model = tiny_model(family)
    ids_BT = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        hidden_BTD = last_hidden(model, input_ids=ids_BT)
        ours_TV, own_TV = head_of(model).logits(hidden_BTD[0]), model(input_ids=ids_BT).logits[0]
    torch.testing.assert_close(ours_TV, own_TV, rtol=1e-5, atol=1e-5)


class ScaledLlama(LlamaForCausalLM):
    """Makes its logits in a way no config tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_a_head_that_is_not_understood_is_refused():
    torch.manual_seed(0)
    with pytest.raises(EngineError, match="ScaledLlama makes its logits in a way"):
        check_head(ScaledLlama(FAMILIES["llama"]()).eval())


def test_broken_weights_are_refused_when_the_head_is_checked():
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(EngineError, match="NaN"):
        check_head(model)


def test_a_loaded_model_is_quiet_and_ready_for_inference(folder, capfd):
    model = load(folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert capfd.readouterr() == ("", "")


def test_dtype_and_attention_are_as_asked(folder):
    model = load(folder, dtype="bfloat16", attention="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load(tmp_path / "nowhere")


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path)


def test_weights_that_are_not_safetensors_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load(folder)


def test_a_missing_tensor_is_named_and_never_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors .*layers\.1\.mlp\.up_proj"):
        load(folder)


def test_a_truncated_weight_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot be loaded .*; copy it again"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    edit_json(folder / "config.json", hidden_size=64)
    with pytest.raises(InputError, match=r"cannot be loaded .*; copy it again"):
        load(folder)


def test_an_unknown_architecture_is_refused(folder):
    edit_json(folder / "config.json", model_type="no_such_model")
    with pytest.raises(InputError, match=r"no_such_model.*; correct it, or copy it again"):
        load(folder)


def test_an_adapter_folder_without_adapter_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        load(folder, adapter=tmp_path)


def test_an_adapter_is_merged_into_the_model(folder, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model("llama"), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load(folder, adapter=tmp_path / "adapter")
    assert isinstance(merged, LlamaForCausalLM)
    ids_BT = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours, theirs = merged(ids_BT).logits, adapted(ids_BT).logits
        assert (ours - tiny_model("llama")(ids_BT).logits).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_peft_names_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"lightopd\[adapters\]"):
        load(folder, adapter=tmp_path)


def test_limits_that_a_config_file_leaves_to_its_class_are_found(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    limits = model_limits(ModelConfig(path=str(tmp_path)))
    defaults = Gemma3TextConfig()
    assert limits.vocabulary_size == defaults.vocab_size
    assert limits.context_length == defaults.max_position_embeddings


def test_limits_that_nobody_names_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model", "vocab_size": 7}))
    with pytest.raises(InputError, match="context length"):
        model_limits(ModelConfig(path=str(tmp_path)))


def test_an_unknown_device_is_refused():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ConfigError, match=name):
            choose_device(name)
