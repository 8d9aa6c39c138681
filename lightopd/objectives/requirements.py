"""What an objective needs, from the declarations of its parts."""

from functools import reduce
from operator import or_
from typing import Any

from lightopd.objectives.base.part import Needs
from lightopd.objectives.exposure import at_signal
from lightopd.objectives.parts.registry import PARTS
from lightopd.schemas.objectives.objective import ObjectiveConfig, TermConfig


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
