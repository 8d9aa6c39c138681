"""How a student is fitted, shared by `sft` and `train`. Defaults live here and nowhere else."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from lightopd.schemas.base import StrictModel

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(StrictModel):
    """AdamW and its schedule; the defaults are the run of arXiv 2604.13010."""

    lr: float = Field(2e-6, gt=0, le=1e30)
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.98)
    """Adam's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """Adam's denominator floor."""
    weight_decay: float = Field(0.1, ge=0, le=1e30)
    """Decoupled weight decay, on matrices only (not on norms, biases and embeddings' scales)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; `linear` and `cosine` would reach zero one step after the last."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global gradient norm; none switches clipping off."""
    steps_before: int = Field(0, ge=0)
    """Steps done before this run, where it is one round of several; warm-up and schedule begin there."""
    steps_in_all: int | None = Field(None, ge=1)
    """Steps that the schedule covers, where this run is one round of several; none for those of the run."""


class StalenessLimits(StrictModel):
    """When the cache no longer speaks about the student that is being trained: a limit passed for 3 steps."""

    max_log_ratio: float = Field(0.2, ge=0)
    """Mean log-probability lost on the cached tokens since they were sampled, in nats; drawn at temperature 1
    it is KL(student at rollout || student now). A convention that docs/study.md does not test."""
    min_overlap: float = Field(0.95, ge=0, le=1)
    """Squared Bhattacharyya coefficient of the student now and who sampled, over its value at rollout. All
    runs that ended below this lost 12 points and more; divergences above .97 gained in the mean, losses on
    sampled tokens lost below .995 (docs/study.md, last table of question 6)."""
    max_chi2: float = Field(1.0, ge=0)
    """Growth of E[(w - 1)^2], w = student now / who sampled, per token; it counts once it is two standard
    errors above this. A convention, and late for losses on sampled tokens: in docs/study.md they lost where
    it was a tenth of this and less (map of question 2, table of question 6)."""
    stop_when_stale: bool = False
    """End training when the cache is stale, never with the first step; rounds do unless told otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _ess_decides_nothing(cls, given: Any) -> Any:
        """Settings saved by version 0.1 have `min_ess`, a limit that one token could pass; it is left out."""
        return {k: v for k, v in given.items() if k != "min_ess"} if isinstance(given, dict) else given


ALL_LINEAR: Final = "all-linear"


class AdapterConfig(StrictModel):
    """A low-rank adapter on a frozen student; dropout is off, as everywhere in training."""

    kind: Literal["lora", "dora"] = "lora"
    """`dora` also trains the length of every row of an adapted matrix."""
    rank: int = Field(16, ge=1)
    """Rank of the update of each matrix."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by `alpha / rank`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    """Adapted layers by the last part of their names, such as `q_proj`; all but the output layer."""
    merge: bool = False
    """Export one plain model instead of the adapter; may be set when training is done."""

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("is empty; name layers such as q_proj, or leave it out")
        return value


class BestConfig(StrictModel):
    """Export the best student of a run in place of the last one."""

    metric: Literal["held_out", "avg_at_k"] = "held_out"
    """Lowest divergence on the rollouts held out, or highest accuracy of `train.accuracy`."""
    patience: int | None = Field(None, ge=1)
    """End training after so many measurements in a row that are no better; none: train to the end."""


class PrivacyConfig(StrictModel):
    """Differential privacy of single prompts with their rollouts (extra `dp`)."""

    clip: float | None = Field(gt=0)
    """Longest gradient of one rollout; none leaves it as it is, which goes with `noise: 0` only."""
    noise: float = Field(ge=0)
    """Standard deviation of the noise on the step's sum of gradients, over `clip`; 0: nothing is private."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the bound that is reported; well below one over the number of prompts."""
    sampling: Literal["poisson", "passes"] = "poisson"
    """`poisson`: each prompt is in a step with the same probability, which the accountants assume, and steps
    differ in size; `passes`: batches of whole passes as without privacy, whose bound gains nothing by it."""
    accountant: Literal["rdp", "prv"] = "rdp"
    """Opacus's accountant: by Renyi divergences, or by numerical composition, which is tighter."""
    seed: int | None = Field(None, ge=0, lt=2**64)
    """Decides draws and noise, for tests: who knows it can take the noise off. None: drawn from the system
    and kept in `privacy.json` of the run."""

    @model_validator(mode="after")
    def _noise_has_a_measure(self) -> "PrivacyConfig":
        if self.noise and self.clip is None:
            raise ValueError("noise is measured in clip, which is none; set clip, such as to 1.0")
        return self


class FinetuneConfig(StrictModel):
    """How a student is fitted to answers or to a cache."""

    steps: int = Field(150, ge=1)
    """Optimiser steps."""
    batch_sequences: int = Field(256, ge=1)
    """Rollouts in one optimiser step, over all devices; a multiple of their number."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Padded tokens in one forward pass on one device; changes memory and speed, never results."""
    layout: Literal["padded", "packed"] = "padded"
    """A row for each rollout, or several end to end that do not see each other; never changes results."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and schedule."""
    adapter: AdapterConfig | None = None
    """Train an adapter instead of all weights (extra `adapters`)."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a moving average of the weights, which is measured and exported in their place."""
    router_loss: float | None = Field(None, gt=0)
    """Weight of the load-balancing loss of a mixture-of-experts student; none leaves it out."""
    privacy: PrivacyConfig | None = None
    """Clip each rollout's gradient and add noise, so that weights tell little of any prompt; none: off."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """`bf16-mixed` runs the student in bfloat16 over float32 weights; `bf16-true` (extra `lowmem`) also keeps
    weights and gradients in bfloat16, rounded at random, and moments in 8 bits."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the decoder's layers with torch; the first step waits for it, results move by rounding only."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Lightning accelerator."""
    devices: int = Field(1, ge=1)
    """Devices on each node."""
    nodes: int = Field(1, ge=1)
    """Nodes."""
    strategy: str = "auto"
    """How devices share the work: `auto` and `ddp` copy the student, `fsdp` shards it."""
    loader_workers: int = Field(0, ge=0)
    """Processes that read the cache ahead of the trainer."""
    shuffle_gib: float = Field(2.0, gt=0)
    """Memory for decoded shards in each device or loader process; a larger cache is shuffled by windows."""
    seed: int = Field(0, ge=0)
    """Seed of the order of rollouts."""
    held_out: int = Field(0, ge=0)
    """Rollouts kept out of training, in whole prompts; the divergence on them goes to `metrics.csv`."""
    held_out_every: int = Field(10, ge=1)
    """Steps between measurements on the rollouts held out; the last step always makes one."""
    best: BestConfig | None = None
    """Keep the checkpoint of the best measurement as well, and export that one."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Lightning loggers beside `metrics.csv`, which is always written; their packages must be installed."""

    @model_validator(mode="after")
    def _bfloat16_weights_go_alone(self) -> "FinetuneConfig":
        if self.precision == "bf16-true":
            for name, is_set in (("ema_decay", self.ema_decay), ("strategy fsdp", self.strategy == "fsdp")):
                if is_set:
                    raise ValueError(
                        f"precision bf16-true does not go with {name}; use bf16-mixed, or leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "FinetuneConfig":
        if self.best and self.best.metric == "held_out" and not self.held_out:
            raise ValueError(
                "best.metric is held_out, and held_out is 0; set held_out to 50 or more rollouts"
            )
        return self
