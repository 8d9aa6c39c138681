"""How evenly the routers of a mixture-of-experts student share the tokens out over the experts.

The load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6), taken over all routers of
the model as transformers does: E sum_e f_e P_e, where f_e counts the assignments to expert e and P_e adds up
its probabilities, each divided by the decisions made (tokens times routers). Both are means over the whole
step, as arXiv 2501.11873 recommends. f_e has no gradient and is counted beforehand; given f_e, the loss is a
sum over micro-batches.
"""

# B = rows of a micro-batch, T = their padded length, E = experts

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightopd.errors import ConfigError
from lightopd.models.head import decoder_output

ROUTER_LOSS = "router_loss"
"""The setting, and its column in `metrics.csv`."""
PROBE_TOLERANCE = 1e-4
"""Relative difference from the model's own loss that rounding explains."""

Routers = tuple[Tensor, ...]
"""Logits [B * T, E] of each router, in the order of the layers."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What the routers decided over a whole step."""

    assigned_E: Tensor
    """int64, tokens sent to each expert, over all routers."""
    num_decisions: Tensor
    """int64 scalar, tokens times routers."""

    def loss(self, routers: Routers, is_token_BT: Tensor) -> Tensor:
        """A micro-batch's share of the load-balancing loss of the step, with gradient; float32 scalar.

        The loss of a step is the number of experts a token is sent to where the load is even, and more where
        it is not.
        """
        share_E = self.assigned_E / self.num_decisions
        probability_E = torch.stack([_probability_sums(logits, is_token_BT) for logits in routers]).sum(0)
        return len(share_E) * (share_E * probability_E).sum() / self.num_decisions


def count_load(routers: Routers, is_token_BT: Tensor, top_k: int) -> Tensor:
    """Tokens sent to each expert, then the decisions made: int64 [E + 1], to be added up over the step."""
    is_token = is_token_BT.flatten()
    num_experts = routers[0].shape[-1]
    counts = [
        torch.bincount(_probabilities(logits)[is_token].topk(top_k).indices.flatten(), minlength=num_experts)
        for logits in routers
    ]
    num_decisions = is_token.sum() * len(routers)
    return torch.cat([torch.stack(counts).sum(0), num_decisions[None]])


def step_load(counts: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> StepLoad:
    """The load of a step from the counts of its micro-batches; `reduce` adds up over the ranks."""
    total = reduce(torch.stack(list(counts)).sum(0))
    return StepLoad(total[:-1], total[-1])


def experts_per_token(student: PreTrainedModel) -> int:
    """How many experts a router sends a token to."""
    return int(_plain(student).num_experts_per_tok)


@torch.no_grad()
def check_experts(student: PreTrainedModel) -> None:
    """Compare the load-balancing loss with the model's own on a few tokens.

    Raises:
        ConfigError: the model has none, or another one.
    """
    model = _plain(student)
    width = model.get_output_embeddings().weight.shape[0]
    ids_BT = (torch.arange(16, device=model.device) * 7919 + 1).remainder(width)[None]
    if "output_router_logits" not in inspect.signature(model.forward).parameters:
        raise ConfigError(_refusal(model, "its forward pass in transformers has no load-balancing loss"))
    inputs = {"input_ids": ids_BT, "use_cache": False, "output_router_logits": True}
    routers = getattr(decoder_output(model, **inputs), "router_logits", None)
    if not routers:
        raise ConfigError(_refusal(model, "its decoder returns no router logits"))
    aux_loss = getattr(model(**inputs), "aux_loss", None)
    if aux_loss is None or getattr(model, "num_experts_per_tok", None) is None:
        raise ConfigError(_refusal(model, "it computes no load-balancing loss of its own"))
    own = float(aux_loss)
    is_token_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    load = step_load([count_load(routers, is_token_BT, experts_per_token(model))], lambda counts: counts)
    ours = float(load.loss(routers, is_token_BT))
    if not abs(ours - own) <= PROBE_TOLERANCE * abs(own):
        raise ConfigError(_refusal(model, f"its own load-balancing loss is {own:.6g}, this one {ours:.6g}"))


def _probability_sums(logits: Tensor, is_token_BT: Tensor) -> Tensor:
    return _probabilities(logits).mul(is_token_BT.flatten()[:, None]).sum(0)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.flatten(0, -2).float().softmax(-1)


def _plain(student: Any) -> Any:
    """The causal language model without its adapter's shell."""
    return student.get_base_model() if hasattr(student, "get_base_model") else student


def _refusal(model: PreTrainedModel, found: str) -> str:
    return f"router_loss does not fit {type(model).__name__}: {found}; leave router_loss out"
