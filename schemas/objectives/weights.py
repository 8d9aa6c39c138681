"""Configs of the parts after the advantage: token and rollout weights, selection, curriculum, callbacks."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lightopd.schemas.base import StrictModel
from lightopd.schemas.objectives.targets import SignalName


class RatioWeight(StrictModel):
    """Truncated importance weight min(student now / who sampled, cap) of a token."""

    kind: Literal["ratio"]
    """No gradient goes through it."""
    cap: float = Field(2.0, gt=0)
    """Largest weight."""


class PpoClipWeight(StrictModel):
    """Importance weight with PPO's clip: no gradient where the ratio has already moved the wanted way."""

    kind: Literal["ppo_clip"]
    """Same gradient as min(r A, clip(r, 1 - low, 1 + high) A) with r = student now / who sampled."""
    low: float = Field(0.2, gt=0, lt=1)
    """Clip below one, for negative advantages."""
    high: float = Field(0.28, gt=0)
    """Clip above one, for positive advantages."""
    dual: float | None = Field(None, gt=1)
    """Ratio above which a negative advantage no longer counts; none leaves it unbounded."""


class LogRatioCutWeight(StrictModel):
    """Leaves out tokens where student and teacher are too far apart (arXiv 2605.03677)."""

    kind: Literal["log_ratio_cut"]
    """Weight 1 where |log s - log T| < limit on the sampled token, else 0."""
    limit: float = Field(10.0, gt=0)
    """In nats."""


class TokenSelectionWeight(StrictModel):
    """Keeps the most useful share of each rollout's tokens (arXiv 2604.14084)."""

    kind: Literal["select_tokens"]
    """Weight 1 for the ceil(keep * tokens) tokens of a rollout with the highest score, else 0."""
    score: Literal["entropy", "soft_or", "confident_wrong"] = "soft_or"
    """h = student's entropy and d = reverse KL, both scaled to [0, 1] within the rollout: h, h + d - h d, or
    (1 - h) d."""
    keep: float = Field(0.5, gt=0, le=1)
    """Share of tokens kept."""
    winsorise: float = Field(0.98, gt=0, le=1)
    """Quantile above which entropies and divergences are cut before scaling."""


class DriftFadeWeight(StrictModel):
    """Fades a rollout once it has left what the teacher would say (arXiv 2605.07804)."""

    kind: Literal["drift_fade"]
    """clip(1 - drop * number of bad tokens so far, 0, 1) + base."""
    bad: Literal["overlap", "nucleus"] = "overlap"
    """A token is bad when the top-k of student at rollout and teacher share too little, or when the teacher's
    nucleus does not hold it."""
    rollout_signal: SignalName = "rollout_student"
    """Signal of the student at rollout, for `overlap`."""
    top_k: int = Field(16, ge=1)
    """Tokens compared for `overlap`."""
    threshold: float = Field(0.9, gt=0, le=1)
    """Smallest shared part of the top-k, or the nucleus' mass."""
    drop: float = Field(0.02, ge=0)
    """Weight lost at each bad token."""
    base: float = Field(0.0, ge=0)
    """Weight that is always kept."""


class HorizonWeight(StrictModel):
    """Trains the beginning of each rollout alone (arXiv 2606.22600, 2605.31490)."""

    kind: Literal["horizon"]
    """Weight 1 for the first tokens of a rollout's trained ones, else 0; one of the two limits is given."""
    share: float | None = Field(None, gt=0, le=1)
    """The first ceil(share * tokens) tokens."""
    tokens: int | None = Field(None, ge=1)
    """The first so many tokens."""

    @model_validator(mode="after")
    def _one_limit(self) -> "HorizonWeight":
        if (self.share is None) == (self.tokens is None):
            raise ValueError("horizon needs one of share and tokens")
        return self


class OutsideChunksWeight(StrictModel):
    """Leaves out the chunks that a target `chunk_audit` trains (arXiv 2606.01476)."""

    kind: Literal["outside_chunks"]
    """Weight 0 inside a chunk, 1 elsewhere."""
    text: SignalName = "continuations"
    """Text column of `lightopd rewrite --gives branches`."""


class InverseStrengthWeight(StrictModel):
    """Divides by the strength of a per-token extrapolation (arXiv 2503.02832)."""

    kind: Literal["inverse_strength"]
    """beta / alpha_t; needs `extrapolate: {kind: by_distance}`."""
    beta: float = Field(0.1, gt=0)
    """Numerator."""


TokenWeight = Annotated[
    RatioWeight
    | PpoClipWeight
    | LogRatioCutWeight
    | TokenSelectionWeight
    | DriftFadeWeight
    | HorizonWeight
    | OutsideChunksWeight
    | InverseStrengthWeight,
    Field(discriminator="kind"),
]


class PerplexityWeight(StrictModel):
    """Weights rollouts of one prompt by perplexity; mean one (arXiv 2604.10688)."""

    kind: Literal["perplexity"]
    """exp(+-log PPL / tau), normalised over the rollouts of the group that the term sees."""
    of: Literal["student", "teacher"] = "student"
    """Student at rollout, or the term's teacher."""
    favour: Literal["high", "low"] = "high"
    """Which perplexity gets the larger weight."""
    tau: float = Field(1.0, gt=0)
    """Large values make the weights equal."""


class ContrastWeight(StrictModel):
    """Weights rollouts that depend on the right evidence (arXiv 2606.25319)."""

    kind: Literal["contrast"]
    """clip(1 + alpha * a, low, high), a = the rollout's gain from the evidence, standardised in its group."""
    negative: SignalName = "negative"
    """Signal of the same teacher under wrong or missing evidence; the term's signal is the right one."""
    gamma: float = Field(1.0, ge=0)
    """Weight of tokens that the evidence made less likely."""
    alpha: float = Field(0.5, ge=0)
    """Strength."""
    low: float = Field(0.0, ge=0)
    """Smallest weight."""
    high: float = Field(2.0, gt=0)
    """Largest weight."""

    @model_validator(mode="after")
    def _ordered(self) -> "ContrastWeight":
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must lie below high {self.high}")
        return self


class PivotWeight(StrictModel):
    """Weights rollouts that look negative from likelihoods alone (arXiv 2606.23104)."""

    kind: Literal["pivots"]
    """exp(mean of the pivots / temperature), divided by the mean over the optimiser step, then capped."""
    threshold: float = 0.8
    """A token is a pivot when log s - log T is at least this; infinity makes all weights one."""
    cap_log_ratio: float = Field(2.5, gt=0)
    """Log-ratios are cut here; 2.5 in the code, 3.0 in the paper."""
    temperature: float = Field(1.0, gt=0)
    """Large values make the weights equal."""
    cap: float = Field(10.0, gt=0)
    """Largest weight after division by the mean."""


class DifficultyWeight(StrictModel):
    """Weighs prompts of medium difficulty more; equal in expectation to sampling them more often."""

    kind: Literal["difficulty"]
    """By the share of the prompt's rollouts that are correct."""
    low: float = Field(0.25, ge=0, le=1)
    """Lowest pass rate of a medium prompt."""
    high: float = Field(0.75, ge=0, le=1)
    """Highest pass rate of a medium prompt."""
    factor: float = Field(2.0, gt=0)
    """Weight of a medium prompt against any other; the mean over the cache is one."""


class ConfidenceWeight(StrictModel):
    """Weighs rollouts by how sure the term's teacher is of them, against others (arXiv 2605.01347)."""

    kind: Literal["confidence"]
    """softmax over the teachers of confidence / (100 tau); the weights of all of them sum to one."""
    text: SignalName
    """Text column of `lightopd rewrite` whose number, from 0 to 100, is this teacher's confidence."""
    others: tuple[SignalName, ...] = Field(min_length=1)
    """Text columns of the other teachers."""
    tau: float = Field(1.0, gt=0)
    """Large values make the weights equal."""

    @model_validator(mode="after")
    def _no_teacher_twice(self) -> "ConfidenceWeight":
        names = [self.text, *self.others]
        if len(set(names)) != len(names):
            raise ValueError(f"a text is named twice: {', '.join(names)}")
        return self


RolloutWeight = Annotated[
    PerplexityWeight | ContrastWeight | ConfidenceWeight | PivotWeight | DifficultyWeight,
    Field(discriminator="kind"),
]


class MarginSelection(StrictModel):
    """Drops the worst correct and best incorrect rollouts until a prompt has its gap (arXiv 2605.03677)."""

    kind: Literal["margin"]
    """By mean log T - log s at rollout."""
    signal: SignalName = "teacher"
    """Teacher of the margin."""
    delta: float = 0.4
    """Wanted gap in nats per token."""
    min_kept: float = Field(0.25, gt=0, le=1)
    """Share of each outcome of a group that is always kept, rounded down, and one rollout at least."""


class OutcomeBalanceSelection(StrictModel):
    """Drops rollouts of the more common outcome until both are equally many."""

    kind: Literal["balance_outcomes"]
    """Which ones go is decided by their ids, not by their order."""


class PassRateSelection(StrictModel):
    """Keeps prompts whose pass rate lies strictly between two bounds."""

    kind: Literal["pass_rate"]
    """By the share of the prompt's rollouts that are correct."""
    above: float = Field(0.0, ge=-1, lt=1)
    """Pass rates up to this are dropped; -1 keeps all."""
    below: float = Field(1.0, gt=0, le=2)
    """Pass rates from this on are dropped; 2 keeps all."""


class BestOfSelection(StrictModel):
    """Keeps one of the teacher's answers to each prompt, and all of the student's (arXiv 2605.09725)."""

    kind: Literal["best_of"]
    """A correct answer before any other; among equals the one whose top-k is most like the student's."""
    signal: SignalName = "teacher"
    """Signal of the teacher over its own answers, with a top-k."""
    student_signal: SignalName = "rollout_student"
    """Signal of the student at rollout over the teacher's answers, with a top-k."""
    top_k: int = Field(16, ge=1)
    """Tokens of each that are compared."""


class TeacherValidatedSelection(StrictModel):
    """Keeps prompts that the teacher solves and the student does not (TVDF, arXiv 2602.02994)."""

    kind: Literal["teacher_validated"]
    """Two conditions: the teacher's own answers score enough, and it is ahead of the student."""
    answers: Path
    """Cache of the teacher's own answers with rewards, over the same prompts."""
    min_teacher: float = 0.5
    """Smallest mean reward of the teacher; the paper's value is not known."""
    sampler: Literal["top", "stride", "buckets", "gaussian"] = "top"
    """Which of the validated prompts: the largest lead, every n-th by lead, the same number from each bucket
    of lead, or drawn around `centre`."""
    prompts: int = Field(2500, ge=1)
    """Prompts kept."""
    buckets: int = Field(5, ge=1)
    """Number of buckets."""
    centre: float = 0.9
    """Preferred lead of `gaussian`."""
    width: float = Field(0.2, gt=0)
    """Spread of `gaussian`."""
    seed: int = 0
    """Seed of `gaussian` and `buckets`."""


Selection = Annotated[
    MarginSelection
    | OutcomeBalanceSelection
    | PassRateSelection
    | BestOfSelection
    | TeacherValidatedSelection,
    Field(discriminator="kind"),
]


class TurnCurriculum(StrictModel):
    """Trains the first turns first (front to back, arXiv 2604.24005)."""

    kind: Literal["turns"]
    """Turns below start + floor(step / every) are trained."""
    start: int = Field(1, ge=1)
    """Turns trained at the first step."""
    every: int = Field(2, ge=1)
    """Steps until one more turn is trained."""
    limit: int | None = Field(None, ge=1)
    """Most turns; none rises to the last."""


class LengthCurriculum(StrictModel):
    """Trains short prefixes first and lengthens while the student stays uncertain (arXiv 2605.16826)."""

    kind: Literal["lengths"]
    """The first so many response tokens are trained; never shortened again."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    """The ladder, in tokens, rising."""
    every: int = Field(25, ge=1)
    """Steps on a rung before the next is considered; with rollouts held out, and between considerations."""
    min_entropy: float = Field(0.0, ge=0)
    """The next rung needs at least this mean token entropy in nats: on the rollouts that `held_out` keeps out
    of training, cut as the rung cuts them, or on the step's where none are. Ours; the paper gives none."""

    @model_validator(mode="after")
    def _rising(self) -> "LengthCurriculum":
        if not self.lengths or self.lengths[0] < 1 or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"lengths must be positive and rise; found {list(self.lengths)}")
        return self


Curriculum = Annotated[TurnCurriculum | LengthCurriculum, Field(discriminator="kind")]


class TeacherExposure(StrictModel):
    """Chooses how much of a solution the teacher is shown while the student learns (arXiv 2605.11458).

    Signals are one model's scores under more and more of the solution. Every `hold` steps one of them takes
    the place of the term's own; what is drawn next follows from how much the held-out loss fell meanwhile.
    """

    kind: Literal["bandit"] = "bandit"
    """A gradient bandit over the signals, in place of the paper's policy over a continuous share."""
    signals: tuple[SignalName, ...] = Field(
        ("exposure_0", "exposure_1", "exposure_2", "exposure_3", "exposure_4"), min_length=2
    )
    """Signals by rising exposure; a term whose `signal` is one of them is taught by the chosen one."""
    hold: int = Field(5, ge=1)
    """Steps between two choices. Ours; the paper's number was not found."""
    rate: float = Field(0.5, gt=0)
    """How far one normalised reward moves the preferences. Ours."""
    explore: float = Field(0.1, ge=0, le=1)
    """Share of the choices that is drawn evenly; in place of the paper's bound on the policy's entropy."""
    seed: int = 0
    """Decides the draws."""


class EmaBalance(StrictModel):
    """Scales one term so that it weighs as much as another (arXiv 2606.00147)."""

    kind: Literal["ema"] = "ema"
    """Factor = running mean of `anchor`'s loss / running mean of `follower`'s loss, one step behind."""
    anchor: str
    """Term that stays as it is."""
    follower: str
    """Term that is scaled."""
    decay: float = Field(0.9, ge=0, lt=1)
    """Of the running means, which begin at zero; that cancels in their ratio."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""


class WeightJump(StrictModel):
    """Jumps along the update at steps 1, 2, 4, ... while a validation score improves (arXiv 2605.11739)."""

    kind: Literal["powers_of_two"] = "powers_of_two"
    """Candidates are W + 2 k (W - anchor), k = 1, 2, ...; the first that does not improve ends the search."""
    max_candidates: int = Field(5, ge=1)
    """Largest k."""
