"""The objective: a sum of terms, each a chain of parts in one fixed order.

signal -> router -> extrapolation -> target -> baseline -> advantage parts -> clip -> token weights
-> reduce over tokens -> rollout weights -> reduce over the batch. `ObjectiveConfig()` is reverse KL on the
teacher's top-k with the tail. A mapping with the keys of a term is an objective of that one term.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from lightopd.schemas.objectives.advantages import (
    AdvantagePart,
    ExpectedBaseline,
)
from lightopd.schemas.objectives.targets import (
    ConstantTarget,
    DistanceExtrapolation,
    DivergenceTarget,
    DomainRouter,
    Entries,
    Extrapolation,
    GrownConfig,
    LogRatioTarget,
    MleTarget,
    PreferenceTarget,
    SignalName,
    SignalRatioTarget,
    Target,
    UnpairedTarget,
)
from lightopd.schemas.objectives.weights import (
    Curriculum,
    EmaBalance,
    InverseStrengthWeight,
    PpoClipWeight,
    RolloutWeight,
    Selection,
    TeacherExposure,
    TokenWeight,
    WeightJump,
)

DEFAULT_TARGET = DivergenceTarget(kind="divergence", divergence="reverse_kl", support="tail")
"""KL(s || T) on the teacher's top-k and the tail."""
_DEFAULT_KINDS = {"target": DEFAULT_TARGET.kind, "extrapolate": "constant"}


def _with_kind(value: Any, field: str | None = None) -> Any:
    """A plain string is a kind; a mapping without one has the field's default kind."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and field in _DEFAULT_KINDS:
        _refuse_keys_of_another_kind(value, field)
        return {"kind": _DEFAULT_KINDS[field], **value}
    return value


def _refuse_keys_of_another_kind(value: dict[str, Any], field: str) -> None:
    """Say that the kind is missing, before the default kind calls its keys unknown."""
    unknown = ", ".join(sorted(value.keys() - DivergenceTarget.model_fields.keys()))
    if field == "target" and "kind" not in value and unknown:
        raise ValueError(
            f"a target without kind is a {DEFAULT_TARGET.kind}, which has no {unknown}; give its kind "
            "(kind: log_ratio is the paper's loss on sampled tokens)"
        )


def _no_kind_twice(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    kinds = [part.kind for part in parts]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ValueError(f"part given twice: {', '.join(twice)}")
    return parts


def _with_kinds(parts: Any) -> Any:
    return tuple(map(_with_kind, parts)) if isinstance(parts, list | tuple) else parts


PartConfig = TypeVar("PartConfig")
Parts = Annotated[tuple[PartConfig, ...], BeforeValidator(_with_kinds), AfterValidator(_no_kind_twice)]
"""Parts of different kinds; a plain string is a kind."""


class TermConfig(GrownConfig):
    """One loss: what is compared with what, and how it is weighed and averaged."""

    later: ClassVar[tuple[str, ...]] = ("is_anchor", "entries")
    name: str = Field("main", pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """Name of the term, in metrics and messages."""
    weight: float = Field(1.0, gt=0)
    """Its coefficient in the sum."""
    rows: Literal["all", "correct", "incorrect", "student", "teacher"] = "all"
    """Rollouts it sees: all, by outcome, or by who wrote them."""
    average_over: Literal["batch", "rows"] = "batch"
    """Mean over the whole batch, or over the rollouts that the term sees (by their share of the cache)."""
    signal: SignalName = "teacher"
    """Cached signal that teaches."""
    entries: Entries | None = None
    """The top-k that parts read of a signal that keeps hidden states; none takes the signal's own, and where
    it has no top-k the teacher's 64 most likely tokens."""
    is_anchor: bool = False
    """The signal is a model to stay near: it is not held to be the student's fine-tuning teacher."""
    router: DomainRouter | None = None
    """Other signals for some domains."""
    extrapolate: Extrapolation | None = None
    """Moves the teacher away from a reference model."""
    target: Target = DEFAULT_TARGET
    """What is computed at each token; the default is reverse KL on the teacher's top-k with the tail, and
    `log_ratio` is the paper's loss on sampled tokens."""
    baseline: ExpectedBaseline | None = None
    """Subtracted from the advantage."""
    advantage: Parts[AdvantagePart] = ()
    """Scales and shifts of the advantage, in the order given."""
    token_weights: Parts[TokenWeight] = ()
    """Weights of single tokens; they multiply."""
    normalise_token_weights: bool = False
    """Divide by the rollout's sum of token weights instead of its number of tokens."""
    reduce: Literal["sequence_mean", "sequence_sum", "token_mean"] = "sequence_mean"
    """Mean of each rollout, then of the batch; sum of each, then mean; or mean over the batch's tokens."""
    rollout_weights: Parts[RolloutWeight] = ()
    """Weights of whole rollouts; they multiply."""

    @field_validator("target", "baseline", "extrapolate", "router", mode="before")
    @classmethod
    def _a_plain_string_is_a_kind(cls, value: Any, info: ValidationInfo) -> Any:
        return _with_kind(value, info.field_name)

    @model_validator(mode="after")
    def _parts_fit_the_target(self) -> "TermConfig":
        is_advantage = self.target.gives == "advantage"
        clips = any(isinstance(weight, PpoClipWeight) for weight in self.token_weights)
        if not is_advantage and (self.baseline or self.advantage or clips):
            raise ValueError(
                f"baseline, advantage parts and ppo_clip need an advantage; {self.target.kind} is a loss: "
                "set target: log_ratio"
            )
        if self.baseline and not (isinstance(self.target, LogRatioTarget) and self.target.student == "now"):
            raise ValueError("a baseline needs target log_ratio with student: now")
        if isinstance(self.target, LogRatioTarget) and self.target.student == "rollout" and not clips:
            raise ValueError(
                "a frozen advantage (student: rollout) has no fixed point at the teacher and collapses over "
                "many steps; add token weight ppo_clip, or use student: now"
            )
        if isinstance(self.target, SignalRatioTarget | ConstantTarget) and not clips:
            raise ValueError(
                f"the student is not in the advantage of target {self.target.kind}, so nothing ends its "
                f"training; add token weight ppo_clip"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> "TermConfig":
        if isinstance(self.target, DivergenceTarget) and self.target.residual and self.extrapolate:
            raise ValueError("residual needs a teacher that is a distribution: leave extrapolate out")
        has_shape = isinstance(self.target, DivergenceTarget) and self.target.tail != "bucket"
        if has_shape and (self.extrapolate or self.router):
            raise ValueError("a tail other than bucket is of one signal: leave extrapolate and router out")
        by_strength = any(isinstance(weight, InverseStrengthWeight) for weight in self.token_weights)
        if by_strength and not isinstance(self.extrapolate, DistanceExtrapolation):
            raise ValueError("token weight inverse_strength needs extrapolate: {kind: by_distance}")
        if self.normalise_token_weights and (self.reduce != "sequence_mean" or not self.token_weights):
            raise ValueError("normalise_token_weights needs token_weights and reduce: sequence_mean")
        if isinstance(self.target, PreferenceTarget | UnpairedTarget) and (
            self.token_weights or self.rollout_weights or self.reduce != "sequence_mean" or self.rows != "all"
        ):
            raise ValueError(
                f"target {self.target.kind} compares whole rollouts: leave weights, rows and reduce out"
            )
        return self


class ObjectiveConfig(GrownConfig):
    """A loss as parts.

    The default is reverse KL on the teacher's top-k with the tail (docs/study.md, question 2); the paper's
    loss: -c methods/lightning_opd.
    """

    later: ClassVar[tuple[str, ...]] = ("shown", "exposure")

    terms: tuple[TermConfig, ...] = (TermConfig(),)
    """Terms that are added; a term's keys may also be given directly, for an objective of one term."""
    shown: SignalName | None = None
    """Text column whose prompts the student is trained under, in place of the rollouts' own."""
    correct_at: float = 0.5
    """A rollout is correct when its reward is at least this."""
    select: Parts[Selection] = ()
    """Which rollouts are trained on, decided once from the whole cache."""
    curriculum: Curriculum | None = None
    """Which tokens are trained on at a step."""
    exposure: TeacherExposure | None = None
    """Which of several signals teaches at a step."""
    balance: EmaBalance | None = None
    """Keeps two terms at equal weight."""
    jump: WeightJump | None = None
    """Extrapolates the weights now and then."""

    @model_validator(mode="before")
    @classmethod
    def _keys_of_a_term_are_one_term(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        term = {key: value[key] for key in value if key in TermConfig.model_fields}
        if not term:
            return value
        if "terms" in value:
            raise ValueError(f"give {', '.join(term)} inside terms, or leave terms out")
        rest = {key: item for key, item in value.items() if key not in term}
        return {**rest, "terms": [term]}

    @model_validator(mode="after")
    def _terms_fit_each_other(self) -> "ObjectiveConfig":
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("an objective needs at least one term")
        if len(set(names)) != len(names):
            raise ValueError(f"two terms have the same name: {', '.join(names)}")
        routed = {term.name: term.router.signals.values() if term.router else () for term in self.terms}
        chosen = {
            (signal, term.entries)
            for term in self.terms
            for signal in (term.signal, *routed[term.name])
            if term.entries
        }
        if len({signal for signal, _ in chosen}) < len(chosen):
            raise ValueError("two terms give other entries for one signal; they are made once, for all terms")
        if self.balance:
            unknown = {self.balance.anchor, self.balance.follower} - set(names)
            if unknown or self.balance.anchor == self.balance.follower:
                raise ValueError(f"balance needs two of the terms {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _exposure_has_a_term(self) -> "ObjectiveConfig":
        if self.exposure is None:
            return self
        taught = [term for term in self.terms if term.signal in self.exposure.signals]
        if not taught or any(term.router or term.extrapolate for term in taught):
            raise ValueError(
                f"exposure needs a term whose signal is one of {', '.join(self.exposure.signals)}, "
                "without router and extrapolate"
            )
        return self


MLE_OBJECTIVE = ObjectiveConfig(terms=(TermConfig(target=MleTarget(kind="mle")),))
"""Supervised fine-tuning: each answer's mean negative log-likelihood."""
FORWARD_KL_OBJECTIVE = ObjectiveConfig(
    terms=(TermConfig(target=DivergenceTarget(kind="divergence", divergence="forward_kl", support="tail")),)
)
"""Fine-tuning on what the teacher holds likely at each token: KL(T || s) on its top-k and the tail."""
