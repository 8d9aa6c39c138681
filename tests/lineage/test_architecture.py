"""A config of transformers 4 and what transformers 5 makes of it are one architecture; another one is not."""

import json

import pytest
from transformers import AutoConfig

from lightopd.lineage.architecture import architecture, spelled_out
from lightopd.lineage.checks import check_student
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.schemas.configs import ModelConfig

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}
NO_BIAS = {**SHAPE, "attention_bias": False}
LLAMA = {**NO_BIAS, "model_type": "llama", "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1}
LLAMA |= {"rope_theta": 500000.0}
NO_WINDOW = {
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 2,
    "hidden_act": "silu",
}
QWEN2 = {**SHAPE, **NO_WINDOW, "model_type": "qwen2", "rope_theta": 1000000.0}
PHI3 = {**NO_BIAS, "model_type": "phi3", "hidden_act": "silu", "rope_theta": 10000.0, "pad_token_id": 0}
PHI3 |= {
    "original_max_position_embeddings": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "sliding_window": 262144,
}
GEMMA = {**NO_BIAS, "head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8, "pad_token_id": 0}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0}
GEMMA |= {"final_logit_softcapping": 30.0}
GEMMA3 = {**GEMMA, "model_type": "gemma3_text", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
GEMMA3 |= {"sliding_window_pattern": 2, "attn_logit_softcapping": None, "final_logit_softcapping": None}
DEEPSEEK = {**NO_BIAS, "model_type": "deepseek_v3", "hidden_act": "silu", "num_key_value_heads": 4}
DEEPSEEK |= {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
DEEPSEEK |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "rope_theta": 10000}
DEEPSEEK |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1}
EXPERTS = {**NO_BIAS, **NO_WINDOW, "model_type": "qwen3_moe", "rope_theta": 1000000.0, "head_dim": 8}
EXPERTS |= {"decoder_sparse_step": 1, "moe_intermediate_size": 16, "norm_topk_prob": True, "num_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2, "mlp_only_layers": [], "router_aux_loss_coef": 0.001}
EXPERTS |= {"output_router_logits": False}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLD = {
    "linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {**QWEN2, "rope_scaling": YARN},
    "yarn without its length": {**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "longrope": {**PHI3, "rope_scaling": {"type": "longrope", **FACTORS}},
    "a part of the head": {**PHI3, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "gemma 2": {**GEMMA, "model_type": "gemma2", "rope_theta": 10000.0},
    "gemma 3": {**GEMMA3, "rope_scaling": None},
    "gemma 3, scaled": {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "deepseek": {**DEEPSEEK, "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}},
    "experts": {**EXPERTS, "rope_scaling": None},
}


def resaved(config, folder):
    """The config as transformers 5 writes it again."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(folder).save_pretrained(folder / "again")
    return json.loads((folder / "again" / "config.json").read_text())


@pytest.mark.parametrize("old", OLD.values(), ids=OLD)
def test_an_old_config_and_its_resaved_form_are_one_architecture(tmp_path, old):
    assert architecture(resaved(old, tmp_path / "model")) == architecture(old)


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_scaling": {**YARN, "factor": 2.0}},
        {"rope_scaling": {**YARN, "type": "dynamic"}},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}},
        {"rope_theta": 10000.0},
        {"max_position_embeddings": 128},
    ],
)
def test_another_scaling_is_another_architecture_before_and_after_it_is_saved_again(tmp_path, changed):
    other = {**OLD["yarn"], **changed}
    assert architecture(other) != architecture(OLD["yarn"])
    assert architecture(resaved(other, tmp_path / "model")) != architecture(OLD["yarn"])


def test_layers_that_alternate_in_another_way_are_another_architecture(tmp_path):
    saved = resaved(OLD["gemma 3"], tmp_path / "model")
    other = {**saved, "layer_types": saved["layer_types"][::-1]}
    assert architecture(other) != architecture(saved)


def test_a_cache_that_knows_a_model_by_the_earlier_spelling_still_takes_it(world, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in world.base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert architecture(config) != spelled_out(config)
    found = fingerprint_model(ModelConfig(path=str(folder)))
    stored = found.model_copy(update={"identity": found.earlier})
    assert found.known_as(found.earlier) == found.earlier
    assert found.known_as("another") == found.known_as(None) == found.identity
    assert check_student(stored, found, (), "train") == ()
    assert "earlier" not in found.model_dump()
