"""What `config.json` says about the computation, in one spelling for old and re-saved files."""

from typing import Any

# Written anew by every save, or read by `generate` only; the end tokens among them are part of the
# tokenizer's fingerprint. `auto_map` gets a repository prefix when a model is saved again.
_NOT_ARCHITECTURE = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_model_name_or_path",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "sep_token_id",
    "task_specific_params",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
# What transformers 5 writes beside `rope_theta` where a model has two kinds of attention.
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
# Models whose old files leave out how layers alternate.
_ALTERNATING = {"gemma2": 2}
# transformers 5 renames the number of experts of these.
_COUNTS_EXPERTS = ("qwen2_moe", "qwen3_moe")
# What a save adds to files of these, and what it is where the file says nothing.
_ADDED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"output_router_logits": False, "pretraining_tp": 1, "rope_interleave": True},
    "gemma3_text": {"use_bidirectional_attention": False},
    "gpt_oss": {"swiglu_alpha": 1.702},
}


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a model computes, the same for an old file and its re-saved form.

    Beyond `spelled_out`, what transformers 5 adds to an old file is taken away where it follows from the
    rest: a second name of the kind of rotary embedding, factors that stand at the top as well, the rotary
    embedding of each kind of layer, and the kinds of layers where they alternate.
    """
    return _reduced(spelled_out(config))


def _reduced(config: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: _reduced(value) if isinstance(value, dict) and key != "rope_parameters" else value
        for key, value in config.items()
    }
    _reduce_layers(kept)
    if isinstance(kept.get("rope_parameters"), dict):
        _reduce_rope(kept)
    if kept.get("model_type") in _COUNTS_EXPERTS and "num_local_experts" in kept:
        kept.setdefault("num_experts", kept.pop("num_local_experts"))
    added = dict(_ADDED.get(str(kept.get("model_type")), {}))
    if kept.get("model_type") == "deepseek_v3":
        added["head_dim"] = kept.get("qk_rope_head_dim")
        parts = kept.get("qk_rope_head_dim"), kept.get("qk_nope_head_dim")
        added["qk_head_dim"] = sum(part for part in parts if isinstance(part, int))
    return {key: value for key, value in kept.items() if key not in added or value != added[key]}


def _reduce_layers(kept: dict[str, Any]) -> None:
    """Drop the kinds of layers where every so many-th one attends to everything and the others nearby."""
    if "_sliding_window_pattern" in kept:
        kept.setdefault("sliding_window_pattern", kept.pop("_sliding_window_pattern"))
    every = kept.get("sliding_window_pattern", _ALTERNATING.get(str(kept.get("model_type"))))
    kinds = kept.get("layer_types")
    if not isinstance(every, int) or every < 1 or not isinstance(kinds, list):
        return
    if kinds == [_LOCAL if (i + 1) % every else _GLOBAL for i in range(len(kinds))]:
        del kept["layer_types"]


def _reduce_rope(kept: dict[str, Any]) -> None:
    rope = dict(kept["rope_parameters"])
    if {*rope} == {_GLOBAL, _LOCAL} and all(isinstance(kind, dict) for kind in rope.values()):
        local = rope[_LOCAL]
        if {*local} == {"rope_type", "rope_theta"} and local["rope_type"] == "default":
            rope, kept["rope_local_base_freq"] = dict(rope[_GLOBAL]), local["rope_theta"]
    if rope.get("type") == rope.get("rope_type"):
        rope.pop("type", None)
    for key, otherwise in (("original_max_position_embeddings", None), ("partial_rotary_factor", 1)):
        if key in rope and rope[key] == kept.get(key, otherwise):
            del rope[key]
    if rope.get("rope_type") == "yarn" and "original_max_position_embeddings" not in kept:
        rope.setdefault("original_max_position_embeddings", kept.get("max_position_embeddings"))
    kept["rope_parameters"] = rope


def spelled_out(config: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` says about the computation, in one spelling for old and new files.

    Left out: keys that every save writes anew, keys that only `generate` reads, nulls, and values that
    follow from others. `rope_theta` and `rope_scaling` become `rope_parameters`, whole floats integers.
    """
    kept = {key: _plain(value) for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    kept = {key: value for key, value in kept.items() if value is not None}
    if "rope_type" not in kept:  # else this is the inside of `rope_parameters`
        _fold_rope(kept)
    if kept.get("use_sliding_window") is False:
        kept.pop("sliding_window", None)
        kept.pop("max_window_layers", None)
    if set(kept.get("layer_types", ())) == {"full_attention"}:
        del kept["layer_types"]
    heads = kept.get("num_attention_heads")
    if isinstance(heads, int) and heads and kept.get("head_dim") == kept.get("hidden_size", 0) // heads:
        kept.pop("head_dim", None)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return spelled_out(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _fold_rope(config: dict[str, Any]) -> None:
    theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None) or {}
    if "rope_parameters" not in config and (theta is not None or scaling):
        rope = {**scaling, **({} if theta is None else {"rope_theta": theta})}
        rope["rope_type"] = rope.pop("rope_type", None) or rope.pop("type", "default")
        rope.pop("type", None)
        config["rope_parameters"] = rope
