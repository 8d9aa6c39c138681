"""Tiny random models of several families, all over 64 tokens."""

import torch
import transformers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {**SMALL, "tie_word_embeddings": False},
    "Qwen3": {**SMALL, "head_dim": 8, "tie_word_embeddings": True},
    "Qwen3Moe": {
        **SMALL,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Gemma3": {**SMALL, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0},
    "Phi": {**SMALL, "num_key_value_heads": 4},
    "Phi3": {**SMALL, "sliding_window": 4},
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Granite": {**SMALL, "logits_scaling": 3.0},
}

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "Qwen3Moe": FAMILIES["Qwen3Moe"],
    "Mixtral": {**SMALL, **EXPERTS},
    "Olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {**SMALL, **EXPERTS},
    "GptOss": {**SMALL, **EXPERTS, "head_dim": 8, "sliding_window": 4},
}
"""Families whose decoder gives router logits and whose loss can hold the experts' load."""
OTHER_MIXTURES = {
    "DeepseekV3": {
        **SMALL,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "Afmoe": {
        **SMALL,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "num_dense_layers": 0,
        "sliding_window": 4,
        "global_attn_every_n_layers": 2,
    },
}
"""Families that balance their experts in another way."""


def make_model(name, seed=0, **changes):
    """A random model in evaluation mode; equal arguments are equal weights."""
    suffix = {"Gemma3": "Gemma3Text", "GPT2": "GPT2"}.get(name, name)
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    sizes = {**FAMILIES, **MIXTURES, **OTHER_MIXTURES}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{suffix}Config")(**sizes, **changes)
    return getattr(transformers, head)(config).eval()
