"""What an objective reads: the cached side of a micro-batch, and the live student's side.

R = rollouts in the micro-batch, N = their response tokens laid end to end, K = widest support of a
signal; nats throughout. Padding entries of a support have id -1 and log-probability -inf.
"""

from dataclasses import dataclass, field

from torch import Tensor

MetricSums = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, weight), detached; add both over micro-batches and devices, then divide."""


@dataclass(frozen=True, slots=True)
class SignalBatch:
    """One cached signal over the micro-batch."""

    logprobs_N: Tensor
    """float32, of the sampled token."""
    topk_ids_NK: Tensor
    """int64, most likely first, -1 where the support is shorter; K may be 0."""
    topk_logprobs_NK: Tensor
    """float32, -inf at padding."""
    tail_logprobs_N: Tensor
    """float32, log of the probability outside the support; -inf when nothing is outside."""
    hidden_ND: Tensor | None = None
    """Float, the last hidden state of the signal's model before each token; None where it is not read."""


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Totals of the whole optimiser step, over every micro-batch and device; what losses are divided by."""

    num_rollouts: int
    """Rollouts with at least one trained token."""
    num_tokens: int
    """Trained tokens."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """The cached side of a micro-batch."""

    ids_N: Tensor
    """int64, sampled tokens."""
    row_N: Tensor
    """int64, which of the R rollouts a token belongs to."""
    index_N: Tensor
    """int64, position within its response, from 0."""
    loss_mask_N: Tensor
    """bool, True where the token is trained on."""
    turns_N: Tensor
    """int64, assistant turn of the token, from 0."""
    ref_logprobs_N: Tensor | None
    """float32, of the sampled token under the student at rollout; None for an imported cache."""
    signals: dict[str, SignalBatch]
    """Cached signals by name, those the objective asked for."""
    lengths_R: Tensor
    """int64, trained tokens of each rollout."""
    rewards_R: Tensor
    """float32, NaN where there is none."""
    is_truncated_R: Tensor
    """bool."""
    groups_R: Tensor
    """int64, rollouts of one prompt share a number, unique over the cache."""
    domains: tuple[str | None, ...]
    """Domain tag of each rollout, R long."""
    rollout_ids: tuple[str, ...]
    """R long; named in errors."""
    totals: BatchTotals
    """Totals of the optimiser step this micro-batch is part of."""
    longest: int
    """Tokens of the longest response, on the host: above every `index_N`."""
    num_turns: int
    """On the host: above every `turns_N`, at least 1."""
    prepared_R: dict[str, Tensor] = field(default_factory=dict)
    """float32, [R] or [R, ...], the columns that `prepare` made from the whole cache, for these rollouts."""
    behavior_logprobs_N: Tensor | None = None
    """float32, of the sampled token under the distribution it was drawn from, with its temperature and
    truncation; None where that is taken to be the student at rollout."""


@dataclass(frozen=True, slots=True)
class StudentTokens:
    """The live side: what the student being trained says now."""

    logprobs_N: Tensor
    """float32, of the sampled token; differentiable."""
    entropies_N: Tensor
    """float32, detached."""
    topk_logprobs_NK: dict[str, Tensor]
    """float32, on the support of each signal that was asked for; differentiable; 0 at padding."""
    tail_logprobs_N: dict[str, Tensor]
    """float32, log of the student's probability outside each support; differentiable."""
    outside_N: dict[str, Tensor] = field(default_factory=dict)
    """float32, by `TERM/SIGNAL` where a tail is not one outcome: what the vocabulary outside the support adds
    to the divergence; differentiable."""
    rebuilt: dict[str, SignalBatch] = field(default_factory=dict)
    """Signals whose top-k was made from hidden states, with it, in the place of the batch's."""
