"""What an objective needs, from the declarations of its parts."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

from lightopd.cache.store import Cache
from lightopd.objectives.base.part import Needs
from lightopd.objectives.base.teacher import teacher_names
from lightopd.objectives.exposure import at_signal
from lightopd.objectives.parts.registry import PARTS
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig
from lightopd.schemas.objectives.targets import Entries


def needs(config: ObjectiveConfig) -> Needs:
    """Everything the objective needs from the cache and from the trainer."""
    of_terms = [term_needs(term) for each in _exposures(config) for term in each.terms]
    of_selections = [_part_needs(part, None) for part in config.select]
    turns = config.curriculum is not None and config.curriculum.kind == "turns"
    of_objective = Needs(
        prepared=bool(config.select),
        state=any(each is not None for each in (config.curriculum, config.balance, config.exposure)),
        columns=("turns",) if turns else (),
        shown=() if config.shown is None else (config.shown,),
    )
    return reduce(or_, [*of_terms, *of_selections, of_objective], Needs())


def kept_hidden(cache: Cache) -> dict[str, int]:
    """The signals that keep hidden states, and the number of top-k entries they keep beside them."""
    manifests = {name: signal.manifest for name, signal in cache.signals.items()}
    return {name: manifest.top_k for name, manifest in manifests.items() if manifest.hidden is not None}


def needs_on(config: ObjectiveConfig, cache: Cache) -> Needs:
    """What the objective reads of this cache: of some signals hidden states in the place of a top-k."""
    return on_signals(needs(config), kept_hidden(cache))


def on_signals(wanted: Needs, hidden: Mapping[str, int]) -> Needs:
    """What is read where some signals keep hidden states: those, in the place of a top-k that is not stored.

    Args:
        wanted: of `needs(config)`.
        hidden: signals that keep hidden states, and the number of top-k entries they keep beside them.
    """
    entries = dict(wanted.entries)
    for name in wanted.topk:
        if hidden.get(name) == 0:
            entries.setdefault(name, Entries())
    made = {name: each for name, each in entries.items() if name in hidden and name in wanted.topk}
    return replace(
        wanted,
        topk=tuple(name for name in wanted.topk if name not in made),
        hidden=tuple(dict.fromkeys((*wanted.hidden, *made))),
        entries=tuple(made.items()),
    )


def _exposures(config: ObjectiveConfig) -> list[ObjectiveConfig]:
    if config.exposure is None:
        return [config]
    return [at_signal(config, config.exposure, signal) for signal in config.exposure.signals]


def term_needs(term: TermConfig) -> Needs:
    """What one term needs."""
    rewards = term.rows in ("correct", "incorrect")
    of_rows = Needs(
        columns=("reward",) if rewards else (),
        prepared=term.rows != "all" or term.average_over == "rows",
        entries=tuple((name, term.entries) for name in teacher_names(term) if term.entries is not None),
    )
    return reduce(or_, [_part_needs(part, term) for part in parts_of(term)], of_rows)


def _part_needs(config: object, term: TermConfig | None) -> Needs:
    found = (each if isinstance(each, Needs) else each(config, term) for each in PARTS[type(config)].needs)
    return reduce(or_, found, Needs())


def parts_of(term: TermConfig) -> tuple[Any, ...]:
    """Configs of a term's parts, in the order of composition."""
    optional = (term.router, term.extrapolate, term.target, term.baseline)
    return (
        *(part for part in optional if part is not None),
        *term.advantage,
        *term.token_weights,
        *term.rollout_weights,
    )
