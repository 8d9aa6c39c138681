"""What a part is: a plain function, and a declaration of what it reads.

R = rollouts, N = their response tokens laid end to end, K = support, M = K + 1 outcomes (support, then tail).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lightopd.objectives.base.batch import MetricSums, RolloutBatch, StudentTokens
from lightopd.schemas.objectives.objective import TermConfig
from lightopd.schemas.objectives.targets import DivergenceTarget, Entries


@dataclass(frozen=True, slots=True)
class WholeTail:
    """A term that compares teacher and student outside the support, token by token."""

    term: str
    """Name of the term."""
    signal: str
    """Whose support and tail it is."""
    target: DivergenceTarget
    """What is summed; its `tail` is not `bucket`."""

    @property
    def key(self) -> str:
        """Where the sums are found: a term has several signals where their exposure changes."""
        return f"{self.term}/{self.signal}"


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective needs from the cache and from the trainer."""

    signals: tuple[str, ...] = ()
    """Cached signals to load: log-probabilities of the sampled tokens, and tails."""
    topk: tuple[str, ...] = ()
    """Those whose top-k must be loaded too."""
    supports: tuple[str, ...] = ()
    """Those on whose top-k the live student is evaluated."""
    hidden: tuple[str, ...] = ()
    """Those whose hidden states must be loaded too."""
    columns: tuple[str, ...] = ()
    """Columns that not every cache has, see `Column` in the config."""
    groups: bool = False
    """Prompts need two rollouts or more."""
    prepared: bool = False
    """`prepare` must run over the whole cache before the first step."""
    step_sums: bool = False
    """Every step needs a pass without gradient that collects `step_sums`."""
    together: bool = False
    """All rollouts of a prompt must lie in one micro-batch."""
    ratio: bool = False
    """The student at rollout stands for the policy that sampled, in an importance ratio."""
    tails: tuple[WholeTail, ...] = ()
    """What is summed over the vocabulary outside a support, where the tail is not one outcome."""
    entries: tuple[tuple[str, Entries], ...] = ()
    """Signals whose top-k is made from their hidden states, and which it is."""
    state: bool = False
    """The objective has a state that `advance` moves after each step and that checkpoints hold."""
    texts: tuple[str, ...] = ()
    """Text columns whose numbers are read."""
    chunks: tuple[str, ...] = ()
    """Text columns of branches, whose chunks and scores are read."""
    shown: tuple[str, ...] = ()
    """The text column whose prompts take the place of the rollouts' own, if there is one."""
    answers: tuple[Path, ...] = ()
    """Caches of the teacher's own answers, for the column `teacher_reward`."""

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(**{each.name: _union(self, other, each.name) for each in fields(self)})


def _union(left: Needs, right: Needs, name: str) -> Any:
    one, two = getattr(left, name), getattr(right, name)
    return one or two if isinstance(one, bool) else tuple(dict.fromkeys((*one, *two)))


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Teacher and student over one support and its tail; both are 0 where an outcome does not exist."""

    teacher_NM: Tensor
    """Log-probabilities, the tail last; not normalised after an extrapolation."""
    student_NM: Tensor
    """Log-probabilities of the live student; differentiable."""
    is_real_NM: Tensor
    """bool, False at padding and where nothing is outside the support."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A term's teacher after router and extrapolation."""

    logprobs_N: Tensor
    """Of the sampled token; not normalised after an extrapolation."""
    topk_ids_NK: Tensor
    """int64, -1 at padding; K is 0 where no part needs it."""
    topk_logprobs_NK: Tensor
    """As cached, before any extrapolation."""
    outcomes: Outcomes | None
    """None where no part needs the student on the support."""
    strength_N: Tensor | None
    """Strength of the extrapolation, None without one."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a part sees of a micro-batch."""

    term: TermConfig
    batch: RolloutBatch
    student: StudentTokens
    teacher: Teacher | None
    """None where no part of the term reads a teacher."""
    step_sums: MetricSums = field(default_factory=dict)
    """Of the whole optimiser step, by `TERM/NAME`, where a part has declared to need them."""

    def taught(self) -> Teacher:
        """The teacher, which the part has declared to need."""
        assert self.teacher is not None, f"term {self.term.name} has a part that does not declare its signal"
        return self.teacher

    def outcomes(self) -> Outcomes:
        """Teacher and student on the support, which the part has declared to need."""
        outcomes = self.taught().outcomes
        assert outcomes is not None, f"term {self.term.name} has a part that does not declare its support"
        return outcomes

    def ref_logprobs_N(self) -> Tensor:
        """Log-probabilities of the sampled tokens under the student at rollout."""
        assert self.batch.ref_logprobs_N is not None, "a part does not declare the column ref_logprobs"
        return self.batch.ref_logprobs_N

    def ratio_N(self) -> Tensor:
        """Probability of the sampled token under the student now over that under who sampled it, detached."""
        behavior_N = self.batch.behavior_logprobs_N
        sampled_N = self.ref_logprobs_N() if behavior_N is None else behavior_N
        return (self.student.logprobs_N.detach() - sampled_N).exp()

    def prepared_R(self, name: str) -> Tensor:
        """A column of `prepare`, one number for each rollout."""
        return self.batch.prepared_R[f"{self.term.name}/{name}"]

    def prepared_N(self, name: str) -> Tensor:
        """A column of `prepare`, spread over the tokens."""
        return self.prepared_R(name)[self.batch.row_N]


NeedsOf = Callable[[Any, Any], Needs]
"""(config of the part, its term, None for a selection) -> what it needs."""

REF = Needs(columns=("ref_logprobs",))
"""The student at rollout on the sampled tokens."""
RATIO = Needs(columns=("ref_logprobs",), ratio=True)
"""The policy that sampled, for a ratio."""
REWARDS = Needs(columns=("reward",), prepared=True)
GROUPS = Needs(groups=True, prepared=True)
"""Several rollouts of a prompt."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the algebra."""

    function: Callable[..., Any] | None
    """What runs on every micro-batch; None where `prepare` has done all."""
    needs: tuple[Needs | NeedsOf, ...] = ()
    """What it reads beyond the live student's log-probability of the sampled token; all of them together."""
    column: Callable[..., Any] | None = None
    """(config, term, table, is_seen_R) -> a column over the whole cache, made by `prepare`."""
    measures: Callable[..., Any] | None = None
    """(config, term) -> what `column` needs per rollout: name -> function of a `ShardColumns`."""
    check: Callable[..., list[str]] | None = None
    """(config, term, table) -> lines for the report; raises where the cache cannot serve the part."""
    step_sums: Callable[..., Any] | None = None
    """(config, scene) -> (sum, weight), collected over the whole optimiser step before the loss; of a target:
    several, by name."""
