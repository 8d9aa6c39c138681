"""Configs of the parts up to the target: router, extrapolation, target.

Every part's config has a `kind`; `lightopd/objectives/parts/registry.py` names the function behind each.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, SerializerFunctionWrapHandler, model_serializer, model_validator

from lightopd.schemas.base import StrictModel

SignalName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
"""Name of a cached signal, as given to `lightopd precompute --signal`."""

Column = Literal["ref_logprobs", "reward", "domain", "turns", "teacher_reward"]
"""Columns of a cache that not every cache has."""


class GrownConfig(StrictModel):
    """A part whose later settings are written only where they are set.

    A checkpoint from before such a setting holds none, and must resume under the same settings.
    """

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        return {
            name: value
            for name, value in found.items()
            if name not in self.later or getattr(self, name) != fields[name].default
        }


class DomainRouter(StrictModel):
    """One teacher per domain, chosen by the rollout's tag."""

    kind: Literal["by_domain"] = "by_domain"
    """Hard routing by the prompt's `domain`."""
    signals: dict[str, SignalName] = Field(min_length=1)
    """Domain tag to signal; any other rollout takes the term's own `signal`."""


class FactorGuard(StrictModel):
    """Inferred limit on the extrapolation factor at near-deterministic tokens (arXiv 2605.08737)."""

    ratio_clip: float = Field(5.0, gt=1)
    """How many times rarer than under the teacher a deviation may become at the fixed point."""
    min_probability: float = Field(0.99, gt=0.5, lt=1)
    """A token counts as near-deterministic when the teacher gives it at least this."""
    max_share: float = Field(0.01, ge=0, le=1)
    """Largest share of near-deterministic tokens whose limit may lie below the factor."""
    action: Literal["warn", "refuse"] = "refuse"
    """What happens above that share, before the first step."""


class ConstantExtrapolation(StrictModel):
    """Teacher moved away from a reference: log T + (factor - 1) (log T - log B) (arXiv 2602.12125)."""

    kind: Literal["constant"] = "constant"
    """The same factor at every token."""
    reference: SignalName = "reference"
    """Signal of B: the student's initial model, or the teacher before its reinforcement learning."""
    factor: float = Field(1.25, gt=0)
    """1 is the teacher itself, below 1 lies between B and T, above 1 goes past the teacher."""
    guard: FactorGuard | None = None
    """Check of the factor against the cache before training; none leaves it unchecked."""


class DistanceExtrapolation(GrownConfig):
    """Extrapolation with a strength per token, scale * sum|T - B| + floor (arXiv 2503.02832)."""

    later: ClassVar[tuple[str, ...]] = ("max_tail",)
    kind: Literal["by_distance"]
    """The strength grows with the distance of the two models at the token."""
    reference: SignalName = "reference"
    """Signal of B, the model to move away from."""
    scale: float = Field(15.0, ge=0)
    """beta2 of the paper: 15 on-policy, 10 off-policy."""
    floor: float = Field(1e-3, gt=0)
    """Strength where the two models agree."""
    max_tail: float = Field(0.01, ge=0, le=1)
    """Largest mean probability outside a model's top-k; tokens in the tail have not the tail's strength."""


Extrapolation = Annotated[ConstantExtrapolation | DistanceExtrapolation, Field(discriminator="kind")]


class TargetConfig(GrownConfig):
    """What every target has."""

    gives: ClassVar[Literal["advantage", "token_loss", "rollout_loss"]] = "token_loss"
    """An advantage becomes the loss -A log s; a loss is differentiated as it stands."""


class LogRatioTarget(TargetConfig):
    """Sampled-token advantage log T - log s, no gradient through it (arXiv 2604.13010)."""

    gives: ClassVar[Literal["advantage"]] = "advantage"
    kind: Literal["log_ratio"]
    """loss = -A log s on the sampled token."""
    student: Literal["now", "rollout"] = "now"
    """Whose s stands in A; `rollout` freezes A, has no fixed point at the teacher, and needs `ppo_clip`."""
    clip: float | None = Field(10.0, gt=0)
    """A is held within +-clip nats, after baseline and shifts; none leaves it as it is."""


class RewardTarget(TargetConfig):
    """Reward against the mean of the prompt's rollouts, divided by their spread (GRPO).

    A prompt with a single rollout has nothing to compare, and 0; verl gives it its plain reward.
    """

    gives: ClassVar[Literal["advantage"]] = "advantage"
    kind: Literal["reward"]
    """One advantage for all tokens of a rollout."""
    epsilon: float = Field(1e-6, gt=0)
    """Added to the standard deviation."""


class SignalRatioTarget(TargetConfig):
    """Advantage log T - log B of two cached models, the student not in it (arXiv 2605.25582; inferred)."""

    gives: ClassVar[Literal["advantage"]] = "advantage"
    kind: Literal["signal_ratio"]
    """loss = -A log s on the sampled token; nothing ends the training but `ppo_clip`, which it needs."""
    reference: SignalName = "reference"
    """Signal of B, the model that training started from."""
    clip: float | None = Field(None, gt=0)
    """A is held within +-clip nats, after shifts; none leaves it as it is."""


class ConstantTarget(TargetConfig):
    """One advantage for every token: a control without a teacher (arXiv 2608.31046)."""

    gives: ClassVar[Literal["advantage"]] = "advantage"
    kind: Literal["constant"]
    """loss = -value log s on the sampled token; nothing ends the training but `ppo_clip`, which it needs."""
    value: float = -1.0
    """The advantage, not 0; Adam divides its size out again, so that the sign is what counts."""

    @model_validator(mode="after")
    def _moves_something(self) -> "ConstantTarget":
        if self.value == 0:
            raise ValueError("an advantage of 0 trains nothing; give value a sign, such as -1")
        return self


class MleTarget(TargetConfig):
    """Maximum likelihood of the sampled tokens."""

    kind: Literal["mle"]
    """loss = -log s on the sampled token; needs no signal."""


class EstimatorTarget(TargetConfig):
    """A sampled estimator of KL(s || T), back-propagated as it stands."""

    kind: Literal["estimator"]
    """k2 has the gradient of `log_ratio`; k3 on frozen samples has the gradient of the forward KL."""
    later: ClassVar[tuple[str, ...]] = ("delta",)
    estimator: Literal["k1", "k2", "k3", "huber"] = "k2"
    """huber is k2 up to a gap of `delta` and linear beyond it. k1 is refused: its gradient has zero mean and
    does not contain the teacher."""
    delta: float = Field(1.0, gt=0)
    """Gap of log T and log s, in nats, from which huber is linear."""
    max_log_ratio: float = Field(20.0, gt=0)
    """log T - log s is held below this inside the exponential of k3."""

    @model_validator(mode="after")
    def _k1_carries_no_teacher(self) -> "EstimatorTarget":
        if self.estimator == "k1":
            raise ValueError(
                "k1 by direct back-propagation has a zero-mean gradient without the teacher; "
                "use kind: log_ratio, or estimator: k2"
            )
        return self


class Residual(StrictModel):
    """What the tail as one outcome leaves out, from the sampled token where it lies outside the support."""

    eta: float = Field(1.0, ge=0, le=1)
    """1 is unbiased for the divergence of the whole vocabulary, given the prefix; 0 adds nothing."""
    cap: float | None = Field(None, gt=0)
    """Largest ratio of student now to the policy that sampled; none is unbiased."""
    clip: float | None = Field(None, gt=0)
    """The tail's log-ratio (reverse_kl) or ratio (forward_kl) is held within +-clip; none is unbiased."""


class DivergenceTarget(TargetConfig):
    """A divergence between teacher and student over the cached support."""

    later: ClassVar[tuple[str, ...]] = ("residual", "tail", "teacher_temperature")
    kind: Literal["divergence"] = "divergence"
    """A differentiable loss at every position."""
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tv", "alpha"
    ] = "reverse_kl"
    """forward_kl = KL(T || s), reverse_kl = KL(s || T), tv = total variation."""
    parameter: float | None = None
    """beta of jsd in [0, 1] (0.5), mixing share of skew in [0, 1) (0.1), alpha of alpha, not 0 or 1 (0.5)."""
    support: Literal["tail", "renormalised", "stop_gradient", "truncated"] = "tail"
    """`tail` adds one outcome for all other tokens; `renormalised` scales both to sum to one on the support;
    `stop_gradient` (reverse_kl only) is sum s sg[log s - log T]; `truncated` is refused."""
    tail: Literal["bucket", "uniform", "shaped", "whole"] = "bucket"
    """What the teacher is outside its top-k: `bucket` compares the mass alone, a lower bound; `uniform` and
    `shaped` spread it, evenly or by the signal's shape, and compare over the whole vocabulary; `whole` reads
    no top-k: it is the teacher itself, from the hidden states that the signal keeps."""
    temperature: float = Field(1.0, gt=0)
    """Both sides are tempered and the loss is multiplied by its square; needs `renormalised`, or `whole`."""
    teacher_temperature: float = Field(1.0, gt=0)
    """The teacher alone is tempered, before `temperature`; below 1 it is sharper. Needs tail: whole."""
    element_clip: float | None = Field(None, gt=0)
    """Contributions of single outcomes are held between 0 and this, in nats; without the lower bound the
    minimum would lie away from the teacher."""
    residual: Residual | None = None
    """Adds the sampled token's residual outside the support; for reverse_kl and forward_kl with a tail."""
    route: Literal["loss", "advantage"] = "loss"
    """`advantage` is refused: a divergence over a support is no score of the sampled token."""

    @model_validator(mode="after")
    def _what_mathematics_allows(self) -> "DivergenceTarget":
        if self.route == "advantage":
            raise ValueError(
                "a top-k divergence is a differentiable loss, never an advantage; use route: loss, "
                "or kind: log_ratio for an advantage"
            )
        if self.support == "truncated":
            raise ValueError(
                "a plain truncated divergence moves probability across the support's edge even where teacher "
                "and student agree (arXiv 2605.11182); use support: tail, renormalised or stop_gradient"
            )
        if self.support == "stop_gradient" and self.divergence != "reverse_kl":
            raise ValueError(f"support: stop_gradient is defined for reverse_kl, not for {self.divergence}")
        if self.residual and (
            self.divergence not in ("forward_kl", "reverse_kl") or self.support != "tail" or self.element_clip
        ):
            raise ValueError("residual needs reverse_kl or forward_kl with support: tail and no element_clip")
        if self.tail != "bucket" and (self.support != "tail" or self.residual):
            raise ValueError(
                f"tail: {self.tail} compares over the whole vocabulary: it needs support: tail, no residual"
            )
        if self.temperature != 1 and self.support != "renormalised" and self.tail != "whole":
            raise ValueError(
                "temperature needs support: renormalised, or tail: whole; a tail of tempered tokens is not "
                "in the cache"
            )
        if self.teacher_temperature != 1 and self.tail != "whole":
            raise ValueError("teacher_temperature needs tail: whole, a teacher over the whole vocabulary")
        return self

    @model_validator(mode="after")
    def _parameter_in_range(self) -> "DivergenceTarget":
        low, high = {"jsd": (0.0, 1.0), "skew_forward_kl": (0.0, 0.999), "skew_reverse_kl": (0.0, 0.999)}.get(
            self.divergence, (float("-inf"), float("inf"))
        )
        if self.parameter is None:
            return self
        if self.divergence in ("forward_kl", "reverse_kl", "tv"):
            raise ValueError(f"{self.divergence} takes no parameter; found {self.parameter}")
        if not low <= self.parameter <= high or (self.divergence == "alpha" and self.parameter in (0.0, 1.0)):
            raise ValueError(f"parameter {self.parameter} is out of range for {self.divergence}")
        return self


class Entries(StrictModel):
    """A top-k that is made in training from the hidden states that a signal keeps."""

    top_k: int = Field(64, ge=1)
    """Entries at a position."""
    of: Literal["teacher", "student"] = "teacher"
    """Whose most likely tokens they are; `student` is the one being trained, as it is now."""


class PreferenceTarget(TargetConfig):
    """Teacher's answer preferred to the student's own (DPO; arXiv 2604.03873)."""

    gives: ClassVar[Literal["rollout_loss"]] = "rollout_loss"
    kind: Literal["preference"]
    """loss = -log sigmoid(beta * margin) over a pair of rollouts, one by the teacher, one by the student."""
    reference: SignalName = "reference"
    """Signal of the frozen warm-up model, scored over both answers."""
    beta: float = Field(0.1, gt=0)
    """Strength of the preference; the paper's value is not known."""


class UnpairedTarget(TargetConfig):
    """Right rollouts preferred to wrong ones, without pairs (arXiv 2605.15113)."""

    gives: ClassVar[Literal["rollout_loss"]] = "rollout_loss"
    kind: Literal["unpaired"]
    """-log sigmoid(rho - delta), mean of the step's right rollouts, and -log sigmoid(delta - rho), of the
    wrong ones; rho = beta log(s / student at rollout), delta the mean of the two outcomes' mean rho."""
    beta: float = Field(0.1, gt=0)
    """Strength of the prior, which is the student at rollout."""


class ChunkAuditTarget(TargetConfig):
    """Likelihood of chunks, weighed by how like them a teacher continues (arXiv 2606.01476)."""

    kind: Literal["chunk_audit"]
    """loss = -sg[(sum of similarities + alpha q) / (their number + alpha)] log s in a chunk, 0 outside; q is
    the student's exp(mean log s) of the chunk."""
    text: SignalName = "continuations"
    """Text column of `lightopd rewrite --gives branches`."""
    alpha: float = Field(1.0, ge=0)
    """How many continuations the student's own confidence counts for; the paper's value is not known."""


class CustomTarget(TargetConfig):
    """A function of your own: (batch, student, options) -> loss of each token, float32 [N]."""

    kind: Literal["custom"]
    """The loss of a token is what the function returns; weights and reduction are as for any target."""
    import_path: str = Field(pattern=r"^[\w.]+:\w+$")
    """`pkg.mod:function`."""
    options: dict[str, JsonValue] = {}
    """Handed to the function as they are."""
    signals: tuple[SignalName, ...] = ()
    """Cached signals the function reads."""
    supports: tuple[SignalName, ...] = ()
    """Signals on whose top-k the function needs the student."""
    columns: tuple[Column, ...] = ()
    """Columns of the cache the function reads."""


Target = Annotated[
    LogRatioTarget
    | SignalRatioTarget
    | ConstantTarget
    | RewardTarget
    | MleTarget
    | EstimatorTarget
    | DivergenceTarget
    | PreferenceTarget
    | UnpairedTarget
    | ChunkAuditTarget
    | CustomTarget,
    Field(discriminator="kind"),
]
