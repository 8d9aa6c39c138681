"""Which attention a model is run with: one that transformers has for it, and that leaves nothing out."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lightopd.errors import ConfigError, InputError
from lightopd.lineage.fingerprint import model_folder
from lightopd.schemas.configs import ModelConfig


def attention_of(model: ModelConfig) -> str:
    """The attention that is set; for `auto` PyTorch's fused one, or eager where that would not be the model.

    Raises:
        InputError: no such folder, or its config cannot be read.
        ConfigError: the model does not have the attention that is set, or loses a part under it.
    """
    if model.attention == "eager":
        return "eager"
    reason = _why_not(model, "sdpa" if model.attention == "auto" else model.attention)
    if reason is None:
        return "sdpa" if model.attention == "auto" else model.attention
    if model.attention == "auto":
        return "eager"
    raise ConfigError(
        f"attention {model.attention} is not what {model.path} is made for: {reason}; "
        f"set attention to auto or eager"
    )


def _why_not(model: ModelConfig, attention: str) -> str | None:
    """What speaks against an attention, in words; None where nothing is known to."""
    config = read_config(model_folder(model).path, trust_remote_code=model.trust_remote_code)
    caps = {
        key: value for key, value in config.get_text_config(decoder=True).to_dict().items() if _is_cap(key)
    }
    for key, value in caps.items():
        if attention == "sdpa" and value:
            return f"it leaves out {key} {value}"
    network = AutoModelForCausalLM._model_mapping.get(type(config), None)  # None: code of the model's own
    has = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}[attention]
    if network is not None and not getattr(network, has, True):
        return f"{network.__name__} of transformers does not have it"
    return None


def _is_cap(key: str) -> bool:
    """Whether a setting caps the logits of attention, as Gemma 2's `attn_logit_softcapping` does."""
    return "softcap" in key and "att" in key


def read_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model folder as transformers understands it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # each family's config class checks values in its own way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"{folder}/config.json cannot be used ({reason}); correct it, or copy it again from where the "
            "model was made"
        ) from error
