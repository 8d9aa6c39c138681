"""Whether a cache can serve an objective, said before the first step, with the command that mends it.

What a config alone can contradict is refused where it is loaded (`schemas/objectives/objective.py`); what
only the values of the cache can tell (NaN, missing rewards, single rollouts) is refused by `prepare`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from lightopd.cache.contexts import text_names
from lightopd.cache.reader import read_columns
from lightopd.cache.signals.horizon import horizons_of
from lightopd.cache.store import Cache
from lightopd.errors import CacheError
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.teacher import teacher_names
from lightopd.objectives.parts.targets import load_custom
from lightopd.objectives.requirements import kept_hidden, needs, on_signals, term_needs
from lightopd.schemas.configs import Horizon
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig
from lightopd.schemas.objectives.targets import (
    ConstantExtrapolation,
    CustomTarget,
    DistanceExtrapolation,
    DivergenceTarget,
    LogRatioTarget,
)
from lightopd.schemas.objectives.weights import DriftFadeWeight, HorizonWeight


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a cache has."""

    path: str
    """For the commands in messages."""
    signals: Mapping[str, int]
    """Signal name to the number of top-k entries it was scored with."""
    columns: frozenset[str]
    """Columns that not every cache has, and this one has."""
    texts: frozenset[str] = frozenset()
    """Names of its text columns."""
    shapes: frozenset[str] = frozenset()
    """Signals that have a shape of their tail."""
    hidden: frozenset[str] = frozenset()
    """Signals that keep hidden states."""
    horizons: Mapping[str, Horizon] = field(default_factory=dict)
    """Of the signals that have one."""
    remarks: tuple[str, ...] = ()
    """What is there and of no use to the objective, one line each."""
    is_teacher_known: bool = True
    """Whether the rollouts say who taught their student, or that nobody did."""
    planned: str | None = None
    """The signal that is not there yet, because the run that asks will make it."""


COLUMN_SOURCES = {
    "ref_logprobs": ("logprobs", "log-probabilities of the student at rollout", "`lightopd rollout`"),
    "reward": ("reward", "rewards", "prompts with an `answer`, then `lightopd rollout`"),
    "domain": ("domain", "domain tags", "prompts with a `domain`, then `lightopd rollout`"),
    "turns": ("turns", "rollouts of several assistant turns", "an import of multi-turn rollouts"),
}
"""Column -> its name on disk, what it is, and what makes it."""


CONTEXT_SIGNALS = ("privileged", "negative")
"""Names that the recipes give to signals whose model saw another prompt than the student."""


def cache_facts(cache: Cache, wanted: Needs) -> CacheFacts:
    """What the cache has of the columns that `wanted` names, and all its signals."""
    signals = {name: signal.manifest.top_k for name, signal in cache.signals.items()}
    there = {name for name in wanted.columns if name in COLUMN_SOURCES and _has(cache, name)}
    if cache.manifest.origin == "mixed":
        there -= {"ref_logprobs"}  # the teacher's rows have none
    if wanted.answers and all((path / "lightopd.json").is_file() for path in wanted.answers):
        there.add("teacher_reward")
    texts, remarks = frozenset(text_names(cache.path)), tuple(cache_remarks(cache, wanted))
    shapes = frozenset(n for n, signal in cache.signals.items() if signal.manifest.tail_shape is not None)
    return CacheFacts(
        str(cache.path),
        signals,
        frozenset(there),
        texts,
        shapes,
        frozenset(kept_hidden(cache)),
        horizons_of(cache, cache.signals),
        remarks,
        is_teacher_known=cache.manifest.sft.proof != "unknown",
    )


def cache_remarks(cache: Cache, wanted: Needs) -> list[str]:
    """What the columns hold that no training of this objective can use, one line each."""
    tables = [read_columns(cache, shard, ["prompt_id", "reward", "truncated"]) for shard in cache.shards]
    if not tables or not cache.num_rollouts:
        return []
    table = pa.concat_tables(tables)
    rewards = pc.drop_null(table.column("reward"))
    groups = table.filter(pc.is_valid(table.column("reward"))).group_by("prompt_id")
    spread = groups.aggregate([("reward", "min"), ("reward", "max")])
    lines = []
    if pc.all(table.column("truncated")).as_py():
        lines.append("every rollout is truncated: no response was ever ended; sample with more max_tokens")
    if "reward" in wanted.columns and len(rewards):
        low, high = pc.min(rewards).as_py(), pc.max(rewards).as_py()
        if low == high:
            lines.append(f"all rewards are {low:g}: nothing tells one rollout from another by its reward")
        elif wanted.groups and pc.all(pc.equal(spread["reward_min"], spread["reward_max"])).as_py():
            lines.append(
                "no prompt has rollouts of differing rewards: within a prompt the reward says nothing"
            )
    return lines + ([line] if wanted.ratio and (line := _ratio_remark(cache)) else [])


def check_origin(cache: Cache, needed: Needs) -> None:
    """Refuse responses of others than the student to an objective that reads the student at rollout.

    Raises:
        CacheError: names the cache, and whose responses it has.
    """
    if "ref_logprobs" in needed.columns and cache.manifest.origin != "student":
        raise CacheError(
            f"the objective compares the student with itself at rollout, and the responses of {cache.path} "
            f"come from: {cache.manifest.origin}; choose an objective without ratio, or roll out again"
        )


def _ratio_remark(cache: Cache) -> str | None:
    """Why a ratio is no importance ratio on this cache; None where it is one."""
    sampling = cache.manifest.sampling
    if sampling is None or sampling.is_raw:
        return None
    if sampling.temperature == 0:
        return (
            "rollouts are greedy: whatever is not the most likely token was never drawn, and no ratio mends "
            "that; sample at a temperature above 0"
        )
    if knows_behavior(cache):
        return None
    return (
        f"rollouts were drawn at temperature {sampling.temperature:g} and top_p {sampling.top_p:g}, and the "
        f"cache has no behavior_logprobs: a ratio against the student at 1 is no importance ratio; roll out "
        f"again (servers: --logprobs-mode processed_logprobs)"
    )


def knows_behavior(cache: Cache) -> bool:
    """Whether every rollout has the log-probabilities of the distribution that it was drawn from."""
    sampling = cache.manifest.sampling
    if sampling is not None and sampling.is_raw:
        return True
    name = "behavior_logprobs"
    return all(read_columns(cache, shard, [name]).column(name).null_count == 0 for shard in cache.shards)


def _has(cache: Cache, name: str) -> bool:
    column = COLUMN_SOURCES[name][0]
    for shard in cache.shards:
        values = read_columns(cache, shard, [column]).column(column)
        if name == "turns":
            if (pc.max(pc.list_flatten(values)).as_py() or 0) > 0:
                return True
        elif values.null_count < len(values):
            return True
    return False


def check_cache(config: ObjectiveConfig, cache: Cache) -> None:
    """Refuse a cache that lacks what the objective reads.

    Raises:
        CacheError: one line that names everything missing, each with the command that adds it.
        ConfigError: a function of the user's own cannot be imported.
    """
    for term in config.terms:
        if isinstance(term.target, CustomTarget):
            load_custom(term.target)
    lines = missing(config, cache_facts(cache, needs(config)))
    if _has_residual(config) and (line := _ratio_remark(cache)):
        lines.append(f"a residual is unbiased by its ratio alone, and {line}")
    if lines:
        raise CacheError(f"{cache.path} cannot serve this objective: {'; '.join(lines)}")


def _has_residual(config: ObjectiveConfig) -> bool:
    targets = (term.target for term in config.terms)
    return any(isinstance(target, DivergenceTarget) and target.residual is not None for target in targets)


def missing(config: ObjectiveConfig, facts: CacheFacts) -> list[str]:
    """What the cache lacks, one line each with the command that adds it; empty when it can serve."""
    wanted = needs(config)
    lines = [line for name in wanted.signals if (line := _missing_signal(name, config, wanted, facts))]
    lines += _missing_hidden(config, wanted, facts)
    lines += [
        f"signal {tail.signal} has no shape of its tail; score it under another name with engine hf "
        f"(lightopd precompute --set shape_tokens=2048), or set tail: uniform or bucket"
        for tail in wanted.tails
        if tail.target.tail == "shaped" and tail.signal in facts.signals and tail.signal not in facts.shapes
    ]
    lines += [
        f"no text {name}; add it: lightopd rewrite --cache {facts.path} --model TEACHER --prompts PROMPTS "
        rf"--template confidence --name {name} --set value='(\d+)'"
        for name in wanted.texts
        if name not in facts.texts
    ]
    lines += [
        f"no text {name}; add it: lightopd rewrite --cache {facts.path} --model TEACHER --prompts PROMPTS "
        f"--gives branches --template continue --name {name} --set sampling.n=4"
        for name in wanted.chunks
        if name not in facts.texts
    ]
    lines += [
        f"no text {name}, whose prompts the student is trained under; add it: lightopd rewrite --cache "
        f"{facts.path} --model STUDENT --set role=self --prompts PROMPTS --gives context --template TEMPLATE "
        f"--name {name}"
        for name in wanted.shown
        if name not in facts.texts
    ]
    lines += _shares_of_shares(config, wanted, facts)
    for name in wanted.columns:
        if name in facts.columns:
            continue
        if name == "teacher_reward":
            folders = ", ".join(str(path) for path in wanted.answers)
            lines.append(
                f"no graded answers of the teacher in {folders}; make them: lightopd rollout --student "
                f"TEACHER --cache {folders}"
            )
            continue
        _, what, source = COLUMN_SOURCES[name]
        lines.append(f"it has no {what}; they come from {source}")
    return lines


def _shares_of_shares(config: ObjectiveConfig, wanted: Needs, facts: CacheFacts) -> list[str]:
    """Token weights that would take a share of what a signal's horizon has left."""
    weights = [part for term in config.terms for part in term.token_weights]
    shares = {part.share for part in weights if isinstance(part, HorizonWeight) and part.share is not None}
    return [
        f"signal {name} has a horizon of {facts.horizons[name]}, and token weight horizon would train the "
        f"share {share:g} of that alone; take the weight out (-c methods/lightning_opd), or score whole "
        f"responses under another name"
        for share in sorted(shares)
        for name in wanted.signals
        if name in facts.horizons
    ]


def _missing_hidden(config: ObjectiveConfig, wanted: Needs, facts: CacheFacts) -> list[str]:
    """Hidden states that are read and not kept, and parts that cannot do with them."""
    readers = dict.fromkeys(wanted.hidden, "tail: whole") | {name: "entries" for name, _ in wanted.entries}
    lines = [
        f"signal {name} keeps no hidden states, which {reader} reads; score it under another name and set "
        f"that name in the objective: lightopd precompute --cache {facts.path} --teacher MODEL --signal "
        f"{name}_hidden --keep hidden"
        for name, reader in readers.items()
        if name in facts.signals and name not in facts.hidden and name != facts.planned
    ]
    lines += [
        f"signal {name} is planned without hidden states, which {reader} reads; set precompute.keep to hidden"
        for name, reader in readers.items()
        if name == facts.planned and name not in facts.hidden
    ]
    made = _made(wanted, facts)
    measured = {
        name
        for term in config.terms
        if isinstance(term.extrapolate, DistanceExtrapolation)
        for name in (*teacher_names(term), term.extrapolate.reference)
    }
    return lines + [
        f"extrapolate by_distance measures the mass outside a stored top-k, and signal {name} stores none; "
        f"score it under another name with --top-k 64"
        for name in sorted(measured & made.keys())
    ]


def _made(wanted: Needs, facts: CacheFacts) -> dict[str, int]:
    """Signals whose top-k is made of hidden states, and its size."""
    hidden = {name: size for name, size in facts.signals.items() if name in facts.hidden}
    return {name: entries.top_k for name, entries in on_signals(wanted, hidden).entries}


def _missing_signal(name: str, config: ObjectiveConfig, wanted: Needs, facts: CacheFacts) -> str | None:
    size = max(_top_k(name, config, wanted), 1 if name in wanted.topk else 0)
    made = _made(wanted, facts).get(name)
    if made is not None and made < size:
        return f"{size} entries or more of signal {name} are needed; set entries.top_k to {size}"
    if made is not None or (name in facts.signals and facts.signals[name] >= size):
        return None
    declared = "" if facts.is_teacher_known else " --sft-teacher MODEL"
    role = declared if name in teachers_of(config) else " --set role=reference"
    if name in CONTEXT_SIGNALS:
        role += " --context privileged --prompts PROMPTS"
    if facts.planned is not None:
        return _unplanned(name, size, config, facts)
    command = f"lightopd precompute --cache {facts.path} --teacher MODEL --signal {{}}{role}"
    top_k = f" --top-k {size if size > 1 else 32 if size else 0}"
    if name in wanted.hidden:
        top_k = " --keep hidden"
    if name not in facts.signals:
        there = ", ".join(f"{known} (top {k})" for known, k in facts.signals.items()) or "none"
        return f"no signal {name} (there: {there}); add it: {command.format(name)}{top_k}"
    named = "" if name == "teacher" else f" --set objective.signal={name}"
    return (
        f"signal {name} has {facts.signals[name]} top-k entries and {size} or more are needed; score it "
        f"under another name and set that name in the objective: {command.format(name + '_topk')}{top_k}"
        + _or_sampled_tokens(name, config, f"-c methods/lightning_opd{named}")
    )


def _unplanned(name: str, size: int, config: ObjectiveConfig, facts: CacheFacts) -> str:
    if name == facts.planned:
        return (
            f"signal {name} is planned with {facts.signals[name]} top-k entries and {size} or more are "
            f"needed; set precompute.top_k to {size if size > 1 else 32}"
            + _or_sampled_tokens(name, config, "set train.objective.target to log_ratio")
        )
    return (
        f"no signal {name} ({facts.planned} is planned); set precompute.signal to {name}, or make a cache "
        "with both by lightopd rollout and lightopd precompute, and train on it with lightopd train"
    )


def _or_sampled_tokens(name: str, config: ObjectiveConfig, remedy: str) -> str:
    """The remedy that scores nothing anew; empty where more than a lone divergence reads the top-k."""
    first = config.terms[0]
    target = LogRatioTarget(kind="log_ratio")
    sampled = config.model_copy(update={"terms": (first.model_copy(update={"target": target}),)})
    is_lone = len(config.terms) == 1 and isinstance(first.target, DivergenceTarget)
    if not is_lone or name in needs(sampled).topk:
        return ""
    return f"; or train with the paper's loss, which reads sampled tokens alone: {remedy}"


def _top_k(name: str, config: ObjectiveConfig, wanted: Needs) -> int:
    """Entries that a part compares by number; other parts take any support."""
    fades = [
        part
        for term in config.terms
        for part in term.token_weights
        if isinstance(part, DriftFadeWeight) and part.bad == "overlap"
    ]
    return max((part.top_k for part in fades if name in wanted.topk), default=0)


def teachers_of(config: ObjectiveConfig) -> set[str]:
    """Signals that teach, in any term; what is left of the needed signals are references.

    A target that reads no teacher (likelihood, preference) has none, whatever its term's `signal` says.
    """
    taught = [term for term in config.terms if not term.is_anchor]
    routed = {name for term in taught if term.router for name in term.router.signals.values()}
    own = {term.signal for term in taught}
    exposed = set(config.exposure.signals) if config.exposure else set()
    return (routed | own | exposed) & set(needs(config).signals)


def warnings_of(config: ObjectiveConfig) -> list[str]:
    """What is allowed but deserves a line before training."""
    return [line for term in config.terms for line in _term_warnings(term)]


def _term_warnings(term: TermConfig) -> list[str]:
    lines = []
    if term.entries and not term_needs(term).topk:
        lines.append(f"term {term.name}: no part of it reads a top-k, so its entries are not made")
    extrapolates = isinstance(term.extrapolate, ConstantExtrapolation) and term.extrapolate.factor != 1
    has_ratio = any(weight.kind == "ratio" for weight in term.token_weights)
    if extrapolates and isinstance(term.target, LogRatioTarget) and term.baseline is None and not has_ratio:
        lines.append(
            f"term {term.name}: a factor other than 1 leaves a constant advantage at the optimum, which "
            f"moves an offline student past it; add baseline: expected, or token weight ratio"
        )
    if isinstance(term.target, LogRatioTarget) and term.target.student == "rollout":
        lines.append(f"term {term.name}: a frozen advantage is not stationary at the teacher; keep steps few")
    return lines
