"""How a model's last hidden state becomes logits, and a check that it does so in a known way.

N = positions, B = sequences, T = positions, D = hidden size, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.errors import EngineError


@dataclass(frozen=True, slots=True)
class Head:
    """How the last hidden state h becomes logits: cap(h W^T + b) / temperature.

    With a softcap c, cap(z) is c tanh(z / c); without one it is z.
    """

    weight_VD: Tensor
    """The output layer's own parameter, tied or not."""
    bias_V: Tensor | None
    softcap: float | None
    temperature: float
    """What the model itself divides its logits by; 1 for most families."""

    def logits(self, hidden_ND: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits float32 [N, V], never rounded to half precision on the way; without gradients only.

        Args:
            hidden_ND: any float dtype.
            out: float32 with at least N rows of V to write into; the result is a view of it.
        """
        if out is None:
            out = hidden_ND.new_empty((len(hidden_ND), len(self.weight_VD)), dtype=torch.float32)
        logits_NV = out[: len(hidden_ND)]
        if self.weight_VD.is_cuda and self.weight_VD.dtype in (torch.float16, torch.bfloat16):
            hidden_ND = hidden_ND.to(self.weight_VD.dtype)
            logits_NV.copy_(torch.mm(hidden_ND, self.weight_VD.T, out_dtype=torch.float32))
        else:
            torch.mm(hidden_ND.float(), self.weight_VD.float().T, out=logits_NV)
        if self.bias_V is not None:
            logits_NV += self.bias_V.float()
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV if self.temperature == 1.0 else logits_NV.div_(self.temperature)


def head_of(model: PreTrainedModel) -> Head:
    """The output layer of a model, read from its modules and config; see `check_head`.

    Raises:
        EngineError: the model has no linear output layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), Tensor) or layer.weight.ndim != 2:
        raise EngineError(
            f"{type(model).__name__} has no linear output layer (found {type(layer).__name__}); "
            f"use a causal language model"
        )
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(
        weight_VD=layer.weight,
        bias_V=getattr(layer, "bias", None),
        softcap=float(softcap) if softcap else None,
        temperature=_own_temperature(config),
    )


def last_hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Hidden states [B, T, D] that the output layer reads, final norm included.

    Args:
        model: any causal language model of transformers.
        inputs: `input_ids` and whatever else its decoder takes; a cache given as `past_key_values` is
            extended in place.
    """
    hidden_BTD: Tensor = decoder_output(model, **inputs).last_hidden_state
    return hidden_BTD


def decoder_output(model: PreTrainedModel, **inputs: Any) -> Any:
    """What the decoder returns, as transformers' output; arguments as for `last_hidden`."""
    decoder = model.get_decoder()
    if decoder is model:  # Llama 4 names itself
        decoder = model.base_model if model.base_model is not model else model.model
    return decoder(**inputs, return_dict=True)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare hidden states times `head_of` with the model's own logits on a few tokens.

    Raises:
        EngineError: they differ, so scores and losses made from the head would not be the model's.
    """
    head = head_of(model)
    vocabulary_size = head.weight_VD.shape[0]
    ids_BT = (torch.arange(8, device=head.weight_VD.device) * 7919 + 1).remainder(vocabulary_size)[None]
    own_TV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    ours_TV = head.logits(last_hidden(model, input_ids=ids_BT, use_cache=False)[0])
    if bool((own_TV.isnan() | (own_TV == torch.inf)).any()):
        raise EngineError(
            f"{type(model).__name__} gives NaN or infinite logits for a few plain tokens: its weights are "
            f"damaged, or it overflows in {model.dtype}; try dtype float32"
        )
    if own_TV.shape != ours_TV.shape:
        raise EngineError(
            f"{type(model).__name__} returns {own_TV.shape[-1]} logits and its output layer has "
            f"{vocabulary_size} rows; use a causal language model"
        )
    difference = float((own_TV - ours_TV).abs().max())
    allowed = _rounding(model.dtype) * max(1.0, float(own_TV.abs().max()))
    if not difference <= allowed:
        raise EngineError(
            f"{type(model).__name__} makes its logits in a way lightopd does not know: they differ by "
            f"{difference:.3g} from hidden states times output layer, and at most {allowed:.3g} is rounding; "
            f"report the model type {model.config.model_type!r}"
        )


def _own_temperature(config: Any) -> float:
    """What a family divides its logits by (or multiplies them with the inverse of)."""
    family = config.model_type
    if family.startswith(("granite", "minicpm3")):
        return float(config.logits_scaling)
    if family.startswith("hyperclovax"):
        return 1.0 / float(config.logits_scaling)
    if family.startswith("cohere"):
        return 1.0 / float(config.logit_scale)
    if family == "falcon_h1":
        return 1.0 / float(config.lm_head_multiplier)
    return 1.0


def _rounding(dtype: torch.dtype) -> float:
    """Relative difference that rounding alone explains."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 4 * torch.finfo(dtype).eps
