"""Config of the stage that lets a model write a text about each rollout, and the columns of such texts."""

import re
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from lightopd.schemas.base import StrictModel
from lightopd.schemas.cache import ROLLOUTS, list_of
from lightopd.schemas.configs import (
    EngineConfig,
    HfEngine,
    ModelConfig,
    PromptsConfig,
    SamplingConfig,
    StageConfig,
    as_prompts,
)
from lightopd.schemas.objectives.targets import SignalName
from lightopd.schemas.prompts import shipped_or_jinja

REWRITES = {
    # arXiv 2606.08432: the teacher repairs the student's own answer. Wording ours.
    "refine": "{{ prompt }}\n\nHere is a draft answer:\n{{ response }}\n\n"
    "Keep what is right in it, repair what is wrong, and write the whole answer.",
    # arXiv 2605.15113: language feedback. Wording ours.
    "feedback": "{{ prompt }}\n\nHere is an answer:\n{{ response }}\n\n"
    "Say in a few sentences what is wrong with it, if anything; do not write the answer.",
    # arXiv 2605.01347: a teacher's confidence after a debate. Wording ours.
    "confidence": "{{ prompt }}\n\nHere is an answer:\n{{ response }}\n\n"
    "How sure are you that it is right? Answer with a number from 0 to 100.",
    # arXiv 2606.18216, binary candidates: one right answer of the teacher, one wrong one of the student, for
    # questions of which the student gets less than half right. Wording ours.
    "which_is_right": "{%- set right = responses | selectattr('origin', 'equalto', 'teacher') "
    "| selectattr('is_right') | list -%}"
    "{%- set own = responses | selectattr('origin', 'equalto', 'student') | list -%}"
    "{%- set wrong = own | selectattr('is_wrong') | list -%}"
    "{%- if right and 2 * wrong | length > own | length -%}"
    "{{ prompt }}\n\nOne of these two answers is right.\n\n"
    "Answer A:\n{{ (right[0] if coin else wrong[0]).response }}\n\n"
    "Answer B:\n{{ (wrong[0] if coin else right[0]).response }}\n\n"
    "Say which one is right, and solve the problem.{%- endif -%}",
    # arXiv 2606.18216, negative candidates: the student's wrong answers, listed as such. Wording ours.
    "none_is_right": "{%- set own = responses | selectattr('origin', 'equalto', 'student') | list -%}"
    "{%- set wrong = own | selectattr('is_wrong') | list -%}"
    "{%- if 2 * wrong | length > own | length -%}{{ prompt }}\n\nThese answers are wrong:\n"
    "{%- for one in wrong %}\n{{ loop.index }}. {{ one.response }}{% endfor %}\n\n"
    "Solve the problem without repeating them.{%- endif -%}",
    # The student's own prompt, for branches of its responses.
    "continue": "{{ prompt }}",
}
"""Templates that a config can name. Variables: `prompt` (text of the last user turn), `response`, `reward`,
`sample_index`, `origin`, `is_right`, `is_wrong`, `pass_rate`, `responses` (all rollouts of the prompt, each
with these), `coin` (0 or 1, by the prompt), `texts.NAME`, and the columns of the prompts file."""

TEXTS = pa.schema(
    [
        ROLLOUTS.field("rollout_id"),
        ROLLOUTS.field("prompt_ids"),
        ROLLOUTS.field("response_ids"),
        pa.field("finish_reason", pa.string()),
        pa.field("text", pa.string()),
        pa.field("value", pa.float32()),
    ]
)
"""Columns of `texts/<name>`: row i of a shard speaks of row i of the rollout shard of that number.

`prompt_ids` is what the model was shown, `response_ids` exactly what it drew, none in a context; `text` and
`finish_reason` are null there, and `value` where no number was found."""

BRANCHES = pa.schema(
    [
        *TEXTS,
        pa.field("places", list_of(pa.int32())),
        pa.field("chunk_counts", list_of(pa.int32())),
        pa.field("forced_ids", pa.list_(pa.int32())),
        pa.field("drawn_counts", list_of(pa.int32())),
        pa.field("scores", list_of(pa.float32())),
    ]
)
"""Columns of `texts/<name>` where rollouts were branched: for branch b the model was shown `prompt_ids`, the
first `places[b]` response ids and `forced_ids[b]`, where there is one, `sampling.n` times.

`drawn_counts` and `scores` have an entry for each draw, branch by branch, and `response_ids` the drawn ids
end to end; a branch stands against `chunk_counts[b]` of the rollout's own ids; `value` is the mean score."""


class BranchConfig(StrictModel):
    """Where each rollout is cut, and what is put there before the model continues."""

    places: int = Field(2, ge=1)
    """Cuts of a rollout, at most: before the trained tokens at which the student was least certain when it
    sampled."""
    force: int = Field(0, ge=0)
    """Tokens that are put at a cut in turn, the likeliest of `signal`; 0 continues the response as it is."""
    signal: SignalName = "rollout_student"
    """Signal with a top-k of at least `force`."""
    score: str = Field("similarity", pattern=r"^(similarity|reward|[\w.]+:\w+)$")
    """Of a continuation, from 0 to 1. `similarity`: runs of ids shared with what the rollout has there, up to
    `sampling.max_tokens`, and cuts lie that far apart. `pkg.mod:function`: your own similarity of two texts.
    `reward`: the prompt's verifier on the whole response."""

    @property
    def compares(self) -> bool:
        """Whether continuations are compared with the rollout's own."""
        return self.score != "reward"


class RewriteConfig(StageConfig):
    """A model is shown each rollout, by a template, and writes a text: a column, a context, or a rollout."""

    cache: Path
    """Cache folder with the rollouts; the texts are stored in it, under `texts/NAME`."""
    model: ModelConfig
    """The model that writes; for a context, the one that will score."""
    name: str = Field("rewrite", pattern=r"^[a-z][a-z0-9_]{0,39}$")
    """Name of the text column; several lie side by side in one cache."""
    gives: Literal["text", "context", "rollouts", "prompts", "branches"] = "text"
    """`text`: what the model writes. `context`: nothing is written, what the template shows is kept for
    `precompute`. `rollouts`: what it writes also becomes the responses of the cache `out`. `prompts`: nothing
    is written, the template makes `out/prompts.jsonl`, one prompt of each prompt where it is not empty.
    `branches`: the model continues the response itself from several of its tokens on, each continuation is
    scored."""
    branches: BranchConfig = BranchConfig()
    """Where `gives: branches` cuts, and how it scores."""
    template: str = "refine"
    """A shipped template (`refine`, `feedback`, `confidence`, `which_is_right`, `none_is_right`, `continue`)
    or Jinja of your own; for branches it makes the prompt before the response."""
    prompts: PromptsConfig
    """Where the rollouts' prompts came from, with the further columns that the template names."""
    turn: Literal["user", "system"] = "user"
    """`user` replaces the last user turn; `system` is put in as the first turn of the conversation."""
    texts: tuple[SignalName, ...] = ()
    """Text columns of the cache that the template names, as `texts.NAME`."""
    value: str | None = None
    """Regular expression with one group that finds a number in the text; it is stored beside it."""
    splice: str | None = None
    """Regular expression with one group: the model writes nothing, the template's text takes the place of the
    group in each response, and all other ids stay; for `gives: rollouts` with `role: self`."""
    out: Path | None = None
    """Folder that `gives: rollouts` (a cache) or `gives: prompts` (a file) makes."""
    role: Literal["teacher", "self", "reference"] = "teacher"
    """As in `precompute`: `teacher` wrote the fine-tuning data, `self` sampled the rollouts."""
    sft_teacher: str | None = None
    """Of rollouts that do not say who taught their student, said now: as at `rollout`."""
    engine: EngineConfig = HfEngine()
    """What runs the model."""
    sampling: SamplingConfig = SamplingConfig()
    """How the model writes: one text for each rollout, `n` continuations of each branch."""

    _prompts = field_validator("prompts", mode="before")(as_prompts)

    @field_validator("template")
    @classmethod
    def _template_is_known_or_jinja(cls, template: str) -> str:
        return shipped_or_jinja(template, REWRITES, "response")

    @field_validator("value", "splice")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        if groups != 1:
            raise ValueError(rf"{pattern!r} has {groups} groups; give it one, such as (\d+)")
        return pattern

    @model_validator(mode="after")
    def _parts_fit(self) -> "RewriteConfig":
        if (self.gives in ("rollouts", "prompts")) != (self.out is not None):
            raise ValueError(
                f"gives is {self.gives} and out is {self.out}; out is what gives: rollouts or prompts makes"
            )
        if self.splice is not None and (self.gives != "rollouts" or self.role != "self"):
            raise ValueError(
                "a spliced response is the student's own; set gives: rollouts, role: self and the model that "
                "sampled, or leave splice out"
            )
        if self.out is not None and self.out == self.cache:
            raise ValueError(f"out and cache are both {self.out}; name a new folder")
        if self.sampling.n != 1 and self.gives != "branches":
            raise ValueError(
                "a rollout gets one text; set sampling.n to 1, and give a second text another name"
            )
        if (not self.is_written or self.gives == "branches") and self.value is not None:
            raise ValueError("no text is written to find a number in; leave value out")
        if self.branches != BranchConfig() and self.gives != "branches":
            raise ValueError(f"gives is {self.gives}, which cuts nothing; set gives: branches")
        if self.name in self.texts:
            raise ValueError(f"text {self.name} cannot be shown to its own writer; leave it out of texts")
        return self

    @property
    def jinja(self) -> str:
        """The template's text."""
        return REWRITES.get(self.template, self.template)

    @property
    def is_written(self) -> bool:
        """Whether a model draws the texts."""
        return self.gives in ("text", "rollouts", "branches") and self.splice is None

    def number_in(self, text: str) -> float | None:
        """The first number that `value` finds in a text; None where there is none."""
        found: Any = re.search(self.value, text) if self.value is not None else None
        try:
            return float(found.group(1)) if found else None
        except ValueError:
            return None
