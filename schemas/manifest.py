"""Lineage on disk: who made what, from what, under which contract.

A cache has `lightopd.json` (a `CacheManifest`, about its rollouts) and one `signals/<name>/signal.json`
(a `SignalManifest`) per signal, so that a signal added later rewrites nothing. A fine-tuned student has
`lightopd_student.json` (a `StudentLineage`) in its folder.
"""

from typing import Literal

import pyarrow as pa
from pydantic import Field, JsonValue

from lightopd.schemas.base import StrictModel
from lightopd.schemas.configs import Allowed, Horizon, SamplingConfig
from lightopd.schemas.lineage.hashing import fingerprint_of
from lightopd.schemas.rewriting import BRANCHES, TEXTS, BranchConfig
from lightopd.schemas.signals.kinds import Hidden, HiddenStates, Kept, Sampled, TailShape, TopK, TopkDtype

CACHE_MANIFEST = "lightopd.json"
SIGNAL_MANIFEST = "signal.json"
TEXT_MANIFEST = "text.json"
STUDENT_LINEAGE = "lightopd_student.json"
PLAIN: dict[str, JsonValue] = {"kind": "plain"}
"""Context of a signal whose model saw the student's own prompt."""


class ModelFingerprint(StrictModel):
    """Which model it is. Two folders with one `identity` hold the same model, whatever their names."""

    identity: str
    """Hash of weights, architecture config and adapter."""
    weights: str
    """Hash over every tensor's name, dtype, shape and bytes; sharding into files does not matter."""
    config: str
    """Hash of the architecture part of `config.json`."""
    adapter: str | None = None
    """Hash of the adapter's weights and config."""
    source: str
    """Path or repository it was read from; for people, never compared."""
    commit: str | None = None
    """Commit of a hub repository."""
    earlier: str | None = Field(None, exclude=True)
    """Identity under the spelling of configs by which older caches know the model; never stored."""

    def is_same_as(self, stored: "ModelFingerprint") -> bool:
        """Whether this model, found now, is the one that a file speaks of."""
        return stored.identity in (self.identity, self.earlier)

    def known_as(self, stored: object) -> str:
        """The identity under which a file that holds `stored` speaks of this model."""
        return self.earlier if self.earlier is not None and stored == self.earlier else self.identity

    def spelled_as(self, stored: "ModelFingerprint | None") -> "ModelFingerprint":
        """This model under the hashes of a file that speaks of it; unchanged where the file does not."""
        if stored is None or not self.is_same_as(stored):
            return self
        return self.model_copy(update={"identity": stored.identity, "config": stored.config})


class Precision(StrictModel):
    """How the weights were run; a difference is reported, not refused."""

    dtype: str
    """Number format of the weights in memory, such as `bfloat16`."""
    quantization: str | None = None
    """Name of the quantisation method, if any."""


class TokenizerFingerprint(StrictModel):
    """Which tokenizer it is, part by part, so that a refusal can name the part."""

    vocabulary: str
    """Hash of the exact token-to-id map."""
    size: int
    """Number of tokens in the map."""
    special_ids: dict[str, list[int]]
    """Ids by role: `bos`, `eos` (all that end a response), `pad`, `unk`."""
    template: str | None
    """Hash of the chat template; None when there is none."""


class Override(StrictModel):
    """A refusal that a user set aside."""

    stage: str
    """Stage that would have refused."""
    allowed: Allowed
    """Name given to `--allow`."""
    found: str
    """What did not agree."""


class EngineRecord(StrictModel):
    """What ran the model."""

    kind: str
    """Engine kind, such as `hf`."""
    version: str
    """Version of the library underneath."""
    settings: dict[str, JsonValue] = {}
    """Settings that can change numbers."""


class NoiseFloor(StrictModel):
    """Differences between two scorings of the same tokens by one engine, alone and in a batch."""

    mean_nats: float = Field(ge=0)
    """Mean absolute difference of sampled-token log-probabilities."""
    max_nats: float = Field(ge=0)
    """Largest absolute difference."""
    tokens: int = Field(ge=0)
    """Tokens compared."""


class SftLineage(StrictModel):
    """Which teacher wrote the data that the student was fine-tuned on."""

    proof: Literal["recorded", "declared", "none", "unknown"]
    """`recorded` by the sft stage; `declared` by the user, not proven; `none`, where the user says that no
    model wrote the data or that it does not matter (Semi-OPD); or `unknown`."""
    teacher: ModelFingerprint | None = None
    """The teacher; None when unknown, or when only its name was declared."""
    name: str | None = None
    """Name of a declared teacher whose files were not at hand; compared as text with the scorer's source."""
    data: str | None = None
    """Hash of the answers, when recorded."""


class StudentLineage(StrictModel):
    """`lightopd_student.json`: where a student comes from."""

    schema_version: int = 1
    """Version of this file's layout."""
    student: ModelFingerprint
    """The very weights beside this file; a copy beside other weights is refused."""
    base: ModelFingerprint | None
    """The model it was made from."""
    sft: SftLineage
    """Its fine-tuning teacher."""
    made_by: str
    """Stage that made it: `sft` or `train`."""
    rendering: dict[str, JsonValue] | None = None
    """How the prompts of its fine-tuning data became ids, as in a cache's manifest; None where unknown."""
    cache: str | None = None
    """Content id of the cache it was trained on, for `train`."""
    overrides: tuple[Override, ...] = ()
    """Refusals set aside on the way, its ancestors' included."""


class JoinedCache(StrictModel):
    """A cache whose rollouts were taken into a joined one."""

    origin: Literal["student", "teacher"]
    """Who wrote its responses."""
    sampler: ModelFingerprint
    """The model that sampled; a row's id is a hash with the identity of its own sampler."""
    content: str
    """Content id of its rollouts."""
    source: str
    """Its folder; for people, never compared."""


class SourceCache(StrictModel):
    """A cache that another one was merged from, or split off."""

    content: str
    """Content id of its rollouts."""
    source: str
    """Its folder; for people, never compared."""
    rollouts: int = Field(ge=0)
    """Rollouts taken from it."""
    seed: int | None = None
    """Seed that its rollouts were sampled with; None where none is known."""
    part: str | None = None
    """Which part of it was taken, such as `1 of 2`; None for the whole."""
    made_of: tuple["SourceCache", ...] = ()
    """What it was itself merged from, or split off."""

    def seeds(self) -> set[int | None]:
        """Seeds of the caches that it goes back to."""
        return set().union(*(each.seeds() for each in self.made_of)) if self.made_of else {self.seed}


class CacheManifest(StrictModel):
    """`lightopd.json`: the contract of a cache's rollouts."""

    schema_version: int
    """Layout version; a newer one is refused."""
    lightopd_version: str
    """Version that wrote it; for people, never compared."""
    origin: Literal["student", "teacher", "imported", "mixed"]
    """Who wrote the responses; in a `mixed` cache, made by `join`, each row says so itself."""
    sampler: ModelFingerprint | None
    """The model that sampled: the student, or the teacher in the sft stage; None when imported."""
    joined: tuple[JoinedCache, ...] = ()
    """The caches that a `mixed` one was made from."""
    made_of: tuple[SourceCache, ...] = ()
    """The caches that it was merged from, or the one that it was split off; empty where a stage made it."""
    precision: Precision | None
    """How the sampler was run."""
    sft: SftLineage
    """The student's fine-tuning teacher."""
    tokenizer: TokenizerFingerprint | None
    """Tokenizer of the ids; None when imported."""
    vocabulary_size: int = Field(ge=1)
    """Width of the model's output; every id lies below it."""
    rendering: dict[str, JsonValue] = {}
    """How prompts became ids: `render`, `template_options`, and `row_options` where rows have their own."""
    rendered_at: str | None = None
    """Time that the chat template was shown, where it writes the date; later stages show it the same one."""
    sampling: SamplingConfig | None
    """Sampling contract; None when imported."""
    prompts: str
    """Hash over the prompts, in order."""
    num_prompts: int = Field(ge=0)
    """Number of prompts."""
    shard_rollouts: int = Field(ge=1)
    """Rollouts in a full shard."""
    num_shards: int = Field(ge=0, le=1_000_000)
    """Shards when complete."""
    engine: EngineRecord | None
    """What ran the sampler."""
    overrides: tuple[Override, ...] = ()
    """Refusals set aside so far, the student's included."""

    @property
    def kind(self) -> str:
        """What its shards are, and their folder in the cache."""
        return "rollouts"

    def fingerprint(self) -> str:
        """Hash of everything that decides the bytes of the shards; paths and lightopd's version left out."""
        return fingerprint_of(self, self.schema_version)


class SignalManifest(StrictModel):
    """`signals/<name>/signal.json`: one model's scores over the rollouts."""

    schema_version: int
    """Layout version; a newer one is refused."""
    name: str
    """Name of the signal and of its folder."""
    role: Literal["teacher", "self", "reference", "imported"]
    """A `teacher` was held to teacher consistency, a `self` to be the model that sampled."""
    rollouts: str
    """Fingerprint of the cache manifest whose rollouts were scored."""
    model: ModelFingerprint | None
    """The model that scored; None when imported."""
    precision: Precision | None
    """How it was run."""
    tokenizer: TokenizerFingerprint | None
    """Its tokenizer."""
    sft_declared: SftLineage | None = None
    """The student's SFT teacher as it was declared for this signal, after the rollouts were made."""
    context: dict[str, JsonValue] = PLAIN
    """What the model saw before the response: `plain`, the student's own prompt; `template`, with its text,
    turn and the hash of all rendered prompts; `written`, with the name of the text column and that hash."""
    support: dict[str, JsonValue] | None = None
    """Whose ids the entries are: None for the model's own top-k; else kind, signal and its content id."""
    top_k: int = Field(ge=0)
    """Most entries kept at a position."""
    min_probability: float = Field(0.0, ge=0)
    """Entries below this were left to the tail."""
    id_limit: int | None = None
    """Ids from here on were left to the tail: the model has more outputs than the student, else None."""
    topk_dtype: TopkDtype
    """Precision of the top-k log-probabilities in their float32 column; parts of a nat are the tail's too."""
    tail: Literal["exact", "derived"]
    """`exact` was summed over the other tokens; `derived` is 1 minus the kept mass."""
    tail_shape: TailShape | None = None
    """How the mass outside the kept tokens lies, on average; None where it was not made."""
    horizon: Horizon | None = None
    """Tokens, or share, of each response that were scored, from its first; None for whole responses."""
    hidden: HiddenStates | None = None
    """The hidden states beside the log-probabilities; None where they are not kept."""
    engine: EngineRecord | None
    """What ran it."""
    noise: NoiseFloor | None = None
    """The engine's own run-to-run noise, measured before scoring."""
    cross_check: NoiseFloor | None = None
    """Differences from transformers in float32, where they were requested."""
    overrides: tuple[Override, ...] = ()
    """Refusals set aside so far, the rollouts' included."""

    @property
    def kind(self) -> str:
        """What its shards are, and their folder in the cache."""
        return f"signals/{self.name}"

    @property
    def keeps(self) -> Kept:
        """What it holds of the model's distributions."""
        if self.hidden is not None:
            return Hidden(states=self.hidden, entries=self.top_k, shape=self.tail_shape)
        if self.top_k == 0:
            return Sampled()
        return TopK(entries=self.top_k, min_probability=self.min_probability, shape=self.tail_shape)

    def fingerprint(self) -> str:
        """Hash of what decides the bytes of the shards; paths, lightopd's version and noise left out."""
        return fingerprint_of(self, self.schema_version)


class TextManifest(StrictModel):
    """`texts/<name>/text.json`: what a model was shown for each rollout, and what it wrote."""

    schema_version: int
    """Layout version; a newer one is refused."""
    name: str
    """Name of the text column and of its folder."""
    role: Literal["teacher", "self", "reference"]
    """As a signal's: to whom the writer was held."""
    rollouts: str
    """Fingerprint of the cache manifest whose rollouts were shown."""
    model: ModelFingerprint
    """The model that wrote, or that reads what it is shown."""
    precision: Precision | None
    """How it was run; None where it wrote nothing."""
    tokenizer: TokenizerFingerprint
    """Its tokenizer."""
    sft_declared: SftLineage | None = None
    """The student's SFT teacher as it was declared for this text."""
    template: str
    """Jinja text over a rollout."""
    turn: Literal["user", "system"] = "user"
    """Turn of the conversation that it fills."""
    prompts: str
    """Hash over what the model was shown, in the order of the rollouts."""
    value: str | None = None
    """Regular expression of a number in the text; None for no number."""
    splice: str | None = None
    """Regular expression of the span of the response that the template replaced; None where it did not."""
    branches: BranchConfig | None = None
    """Where responses were cut and continued; None where they were not."""
    sampling: SamplingConfig | None
    """How it wrote; None for a context, where nothing is written."""
    engine: EngineRecord | None
    """What ran it."""
    overrides: tuple[Override, ...] = ()
    """Refusals set aside so far, the rollouts' included."""

    @property
    def kind(self) -> str:
        """What its shards are, and their folder in the cache."""
        return f"texts/{self.name}"

    @property
    def columns(self) -> pa.Schema:
        """Columns of its shards."""
        return TEXTS if self.branches is None else BRANCHES

    def fingerprint(self) -> str:
        """Hash of what decides the bytes of the shards."""
        return fingerprint_of(self, self.schema_version)


class ShardMarker(StrictModel):
    """`part-NNNNN.json`, written after its Parquet file is in place: the shard exists and is whole."""

    rows: int = Field(ge=0)
    """Rows in the file."""
    tokens: int = Field(ge=0)
    """Response tokens in the file."""
    size_bytes: int = Field(ge=0)
    """Size of the file."""
    sha256: str
    """SHA-256 of the file."""
    fingerprint: str
    """Fingerprint of the manifest it was made under."""
    dropped: dict[str, int] = {}
    """Rows left out, by reason."""
    shard: int | None = None
    """Number of the shard, so that a file under another's name shows; None in older ones."""
    made_from: dict[str, JsonValue] | None = None
    """The manifest that it was made under, so that one that is lost can be made again; None in older ones."""
