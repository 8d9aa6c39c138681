"""What a user can set: one frozen model per stage. Defaults live here and nowhere else."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lightopd.schemas.base import StrictModel
from lightopd.schemas.engines import ADAPTER_CONFIG as ADAPTER_CONFIG
from lightopd.schemas.engines import MIN_SHAPE_TOKENS, SharingConfig
from lightopd.schemas.engines import EngineConfig as EngineConfig
from lightopd.schemas.engines import HfEngine as HfEngine
from lightopd.schemas.engines import Horizon as Horizon
from lightopd.schemas.engines import ModelConfig as ModelConfig
from lightopd.schemas.engines import SamplingConfig as SamplingConfig
from lightopd.schemas.engines import ServerEngine as ServerEngine
from lightopd.schemas.engines import VllmEngine as VllmEngine
from lightopd.schemas.finetune import FinetuneConfig, OptimizerConfig, StalenessLimits
from lightopd.schemas.objectives.objective import FORWARD_KL_OBJECTIVE, MLE_OBJECTIVE, ObjectiveConfig
from lightopd.schemas.prompts import AnyContext as AnyContext
from lightopd.schemas.prompts import ContextConfig as ContextConfig
from lightopd.schemas.prompts import FilePrompts as FilePrompts
from lightopd.schemas.prompts import PromptRendering as PromptRendering
from lightopd.schemas.prompts import PromptsConfig as PromptsConfig
from lightopd.schemas.prompts import ReasoningGymPrompts as ReasoningGymPrompts
from lightopd.schemas.prompts import RunningTotalsPrompts as RunningTotalsPrompts
from lightopd.schemas.prompts import as_prompts as as_prompts
from lightopd.schemas.signals.precision import TopkDtype

Allowed = Literal[
    "teacher-mismatch",
    "student-mismatch",
    "tokenizer-mismatch",
    "special-ids-mismatch",
    "template-mismatch",
]


class StageConfig(StrictModel):
    """What every stage has."""

    allow: tuple[Allowed, ...] = ()
    """Refusals that are overridden; each is recorded in everything made afterwards."""


def trained_in_float32(student: ModelConfig) -> ModelConfig:
    """Refuse a number format that training would not use.

    Raises:
        ValueError: another format than float32 is set.
    """
    if student.dtype not in ("auto", "float32"):
        raise ValueError(
            f"dtype is {student.dtype}, and weights are trained and stored in float32; leave it out, and set "
            "precision to bf16-mixed to compute in half precision"
        )
    return student


class SftConfig(StageConfig):
    """A teacher answers prompts; a student is fine-tuned on the answers."""

    prompts: PromptsConfig
    """Prompts the teacher answers."""
    teacher: ModelConfig
    """The model that answers; it must also be the one that scores later."""
    student: ModelConfig
    """The model that is fine-tuned."""
    out: Path
    """Folder of the run: `answers/` and `student/` are made in it."""
    part: Literal["both", "answers", "finetune"] = "both"
    """Which half to run; `finetune` takes the finished `answers/`."""
    engine: EngineConfig = HfEngine()
    """What runs the teacher."""
    sampling: SamplingConfig = SamplingConfig()
    """How the teacher answers."""
    shard_rollouts: int = Field(256, ge=1)
    """Answers in one shard, the unit of work and of resume."""
    top_k: int | None = Field(None, ge=1)
    """The teacher also scores its answers and keeps so many tokens at each position; the student is then
    fitted by forward KL on them. None: by the likelihood of what was drawn."""
    finetune: FinetuneConfig = FinetuneConfig(
        optimizer=OptimizerConfig(lr=8e-5, schedule="cosine", warmup_steps=15)
    )
    """How the student is fitted to the answers."""

    _prompts = field_validator("prompts", mode="before")(as_prompts)
    _student = field_validator("student")(trained_in_float32)

    @property
    def objective(self) -> ObjectiveConfig:
        """The loss that the student is fitted by."""
        return MLE_OBJECTIVE if self.top_k is None else FORWARD_KL_OBJECTIVE

    @model_validator(mode="after")
    def _best_is_held_out(self) -> "SftConfig":
        if self.finetune.best and self.finetune.best.metric != "held_out":
            raise ValueError("sft measures no accuracy; set finetune.best.metric to held_out")
        return self

    @model_validator(mode="after")
    def _the_student_has_a_folder_of_its_own(self) -> "SftConfig":
        if self.finetune.adapter is not None and not self.finetune.adapter.merge:
            raise ValueError(
                "the fine-tuned student takes over the teacher's tokenizer, which an adapter cannot hold; "
                "set finetune.adapter.merge to true"
            )
        return self


class RolloutConfig(StageConfig):
    """The student answers prompts; ids, log-probabilities and rewards are stored."""

    prompts: PromptsConfig
    """Prompts the student answers."""
    student: ModelConfig
    """The fine-tuned student that samples."""
    cache: Path
    """Cache folder that is created; `precompute` adds the teacher's signals to it."""
    sft_teacher: str | None = None
    """Teacher behind the fine-tuning of a student made elsewhere (folder or name): declared, not proven;
    `none` claims no such teacher."""
    engine: EngineConfig = HfEngine()
    """What runs the student."""
    sampling: SamplingConfig = SamplingConfig()
    """How the student samples."""
    shard_rollouts: int = Field(256, ge=1)
    """Rollouts in one shard, the unit of work and of resume; groups of one prompt stay together."""
    keep_text: bool = True
    """Store prompt and response text beside the ids, for reading only."""
    sharing: SharingConfig = SharingConfig()
    """Which processes make the shards together."""

    _prompts = field_validator("prompts", mode="before")(as_prompts)


class ImportConfig(StageConfig):
    """Responses that exist already become a cache."""

    responses: FilePrompts
    """File of prompts with responses: text, ids, or whole conversations."""
    student: ModelConfig
    """The student whose tokenizer makes the ids and whose log-probabilities are stored."""
    cache: Path
    """Cache folder that is created."""
    sft_teacher: str | None = None
    """Teacher behind the fine-tuning of a student made elsewhere (folder or name): declared, not proven."""
    engine: EngineConfig = HfEngine()
    """What runs the student."""
    shard_rollouts: int = Field(256, ge=1)
    """Most responses in one shard, the unit of work and of resume."""


class PrecomputeConfig(StageConfig):
    """A teacher scores every token of the cached rollouts."""

    cache: Path
    """Cache folder that receives the signal."""
    rollouts: Path | None = None
    """Cache to take the rollouts from, a folder or a URL, when it is another; they are copied and checked."""
    teacher: ModelConfig
    """The model that scores; refused unless it is what `role` says."""
    sft_teacher: str | None = None
    """Of rollouts that do not say who taught their student, said now, for this signal: as at `rollout`."""
    signal: str = Field("teacher", pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """Name of the signal; several signals live side by side in one cache."""
    role: Literal["teacher", "self", "reference"] = "teacher"
    """`teacher` wrote the fine-tuning data; `self` sampled the rollouts, or was trained from the model that
    did; `reference` is held to neither."""
    context: AnyContext | None = None
    """Show the scoring model another prompt than the student's: a template, or what a text column's model was
    shown; none scores under the student's own."""
    top_k: int = Field(32, ge=0)
    """Most likely tokens kept at each position; 0 keeps the sampled token only."""
    min_probability: float = Field(0.0, ge=0.0, lt=1.0)
    """Drop top-k entries less likely than this; their probability moves to the tail."""
    support: Literal["teacher", "student", "both"] = "teacher"
    """Entries at a position: this model's top-k, the ids of `support_signal` there, or both together."""
    support_signal: str = "rollout_student"
    """Signal of the same cache whose top-k ids are the student's, made with the student as the model."""
    topk_dtype: TopkDtype = "float16"
    """Precision of the top-k log-probabilities; those of sampled tokens are float32. `float16` saves a third,
    `sixteenths`, `eighths`, `quarters` of a nat, of the tail as well, a fifth to a quarter of the rest."""
    shape_tokens: int | None = Field(None, ge=0)
    """Response tokens, from the first rollouts, whose scores make the shape of the tail (`tail: shaped`): 256
    or more, 0 for none. Left out, 2048 where engine (hf), top-k and cache allow it."""
    keep: Literal["topk", "hidden"] = "topk"
    """`hidden` keeps the last hidden state of every token too, which gives the whole vocabulary (engine hf);
    `top_k` is 0 then, where it is left out."""
    hidden_format: Literal["int8", "bfloat16"] = "int8"
    """Format of the hidden states: D + 2 bytes a token, standardised per channel, or 2 D."""
    hidden_tokens: int = Field(2048, ge=MIN_SHAPE_TOKENS)
    """Response tokens, from the first rollouts, that the statistics of int8 are made from."""
    engine: EngineConfig = HfEngine()
    """What runs the teacher."""
    horizon: Horizon | None = None
    """Score the first tokens (512), or share (0.3), of each response alone; training masks the rest."""
    max_noise_nats: float = Field(0.05, gt=0)
    """Refuse an engine whose two scorings of the same tokens lie further apart than this, on average."""
    cross_check: int = Field(0, ge=0)
    """Also compare so many rollouts with transformers in float32, held to the same limit."""
    sharing: SharingConfig = SharingConfig()
    """Which processes score the shards together."""

    @model_validator(mode="after")
    def _support_fits(self) -> "PrecomputeConfig":
        if self.support == "teacher":
            return self
        if self.engine.kind != "hf":
            raise ValueError(
                f"support: {self.support} needs log-probabilities of given ids, which engine "
                f"{self.engine.kind} cannot give (vLLM returns the most likely ones only); use engine hf"
            )
        if self.min_probability or self.support_signal == self.signal:
            raise ValueError("support of another signal goes with min_probability: 0, and not with itself")
        return self

    @model_validator(mode="before")
    @classmethod
    def _hidden_states_need_no_entries(cls, given: Any) -> Any:
        is_bare = isinstance(given, dict) and given.get("keep") == "hidden" and "top_k" not in given
        return {**given, "top_k": 0} if is_bare else given

    @model_validator(mode="after")
    def _hidden_states_can_be_had(self) -> "PrecomputeConfig":
        if self.keep == "hidden" and self.engine.kind != "hf":
            raise ValueError(
                f"keep: hidden needs the hidden states that the head reads, which engine {self.engine.kind} "
                "does not give (vLLM's come without the final norm); use engine hf"
            )
        if self.keep == "hidden" and self.support != "teacher":
            raise ValueError(f"keep: hidden has every id, support: {self.support} adds none; leave one out")
        return self

    @model_validator(mode="after")
    def _shape_can_be_made(self) -> "PrecomputeConfig":
        if self.shape_tokens and self.shape_tokens < MIN_SHAPE_TOKENS:
            raise ValueError(f"shape_tokens: {self.shape_tokens} is too few; give {MIN_SHAPE_TOKENS} or more")
        if self.shape_tokens and (self.engine.kind != "hf" or not self.top_k or self.support != "teacher"):
            raise ValueError(
                "shape_tokens needs engine hf, which sees whole tails, a top_k, support: teacher"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_are_another_folder(self) -> "PrecomputeConfig":
        if self.rollouts == self.cache:
            raise ValueError(f"rollouts and cache are both {self.cache}; leave rollouts out, to score in it")
        return self


class AccuracyConfig(StrictModel):
    """The student answers prompts while it is trained: `avg_at_k` in `metrics.csv`."""

    prompts: PromptsConfig
    """Held-out prompts with answers; those without one are left out."""
    every: int = Field(50, ge=1)
    """Steps between measurements; the last step always makes one."""
    sampling: SamplingConfig = SamplingConfig()
    """How the student answers; `n` is the k of avg@k."""
    generate_rollouts: int = Field(64, ge=1)
    """Answers that a device generates together."""

    _prompts = field_validator("prompts", mode="before")(as_prompts)


class TrainConfig(StageConfig, FinetuneConfig):
    """A student is trained against the cache, with no teacher alive."""

    cache: Path
    """Cache folder with rollouts and signals."""
    student: ModelConfig
    """The student that sampled the rollouts."""
    out: Path
    """Folder of the run: `student/`, `checkpoints/` and logs are made in it."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss, as parts; left out, reverse KL on the top-k. The paper's: -c methods/lightning_opd."""
    staleness: StalenessLimits = StalenessLimits()
    """Limits past which the run says that the cache is stale."""
    continue_from: Path | None = None
    """`out` of the run that made this student; its optimiser state is taken over. None: a new one."""
    accuracy: AccuracyConfig | None = None
    """Measure the student's answers during training; a run file lends `eval_prompts`, `eval.sampling`."""

    _student = field_validator("student")(trained_in_float32)

    @model_validator(mode="after")
    def _best_accuracy_is_measured(self) -> "TrainConfig":
        if self.best and self.best.metric == "avg_at_k" and self.accuracy is None:
            raise ValueError("best.metric is avg_at_k, and nothing measures it; set accuracy.prompts")
        return self

    @model_validator(mode="after")
    def _privacy_is_of_one_run(self) -> "TrainConfig":
        if self.privacy and self.continue_from:
            raise ValueError("privacy is counted for one run alone; leave continue_from out")
        if self.privacy and self.staleness.stop_when_stale:
            raise ValueError(
                "privacy needs an end that no rollout decides; set staleness.stop_when_stale: false"
            )
        return self

    @model_validator(mode="after")
    def _unpaired_outcomes_are_those_of_a_step(self) -> "TrainConfig":
        if self.held_out and any(term.target.kind == "unpaired" for term in self.objective.terms):
            raise ValueError(
                "target unpaired compares the rollouts of a step, so there is no measure on held-out ones; "
                "set held_out to 0"
            )
        return self

    @model_validator(mode="after")
    def _a_jump_has_matrices_and_a_score(self) -> "TrainConfig":
        if self.objective.jump is not None and self.adapter is not None:
            raise ValueError(
                "objective.jump moves along the update of whole matrices, and adapter trains factors of one; "
                "leave out adapter, or objective.jump"
            )
        if self.objective.jump is not None and not self.held_out:
            raise ValueError(
                "objective.jump needs a score on held-out rollouts, and held_out is 0; set held_out to 50 or "
                "more"
            )
        return self


class EvalConfig(StrictModel):
    """A model answers held-out prompts; accuracy and divergence from a teacher are measured."""

    model: ModelConfig
    """The model that is evaluated."""
    prompts: PromptsConfig
    """Held-out prompts."""
    out: Path
    """Folder of the answers and of the report."""
    teacher: ModelConfig | None = None
    """Also measure KL to this teacher, over the full vocabulary, on the model's own answers."""
    engine: EngineConfig = HfEngine()
    """What runs the model."""
    sampling: SamplingConfig = SamplingConfig()
    """How the model answers; `n` is the k of avg@k and pass@k."""
    shard_rollouts: int = Field(256, ge=1)
    """Answers in one shard."""

    _prompts = field_validator("prompts", mode="before")(as_prompts)

    @model_validator(mode="after")
    def _kl_has_both_models_here(self) -> "EvalConfig":
        if self.teacher is not None and self.engine.kind != "hf":
            raise ValueError(
                f"KL to a teacher needs both models in this process, and engine.kind is {self.engine.kind}; "
                "set it to hf, or leave out teacher (in a run file: eval_divergence)"
            )
        return self
