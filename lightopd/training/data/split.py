"""Which rollouts of a cache are trained on, which stay together, and which are held out."""

# P = rollouts of the index, U = prompts

import logging
from dataclasses import dataclass, replace

import numpy as np

from lightopd.cache.reader import largest_id, rows_beyond
from lightopd.cache.store import Cache
from lightopd.errors import CacheError, ConfigError, TrainingError
from lightopd.objectives.base.part import Needs
from lightopd.objectives.preparation.cache_tables import cache_views
from lightopd.objectives.preparation.prepare import prepare_rollouts
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.data.plan import CacheIndex
from lightopd.training.data.shard_store import FirstReading, index_cache

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SelectedRollouts:
    """The rollouts of a run."""

    trained: CacheIndex
    held_out: CacheIndex | None
    """None when nothing is held out."""
    notes: tuple[str, ...]
    """What was dropped, and warnings; for the stage's report."""


def select_rollouts(
    cache: Cache,
    objective: ObjectiveConfig,
    needed: Needs,
    held_out: int,
    reading: FirstReading | None = None,
    id_limit: int | None = None,
) -> SelectedRollouts:
    """Read the whole cache once for what the objective decides before the first step, and index the rest.

    Args:
        cache: complete, with the signals that `needed` names.
        objective: the loss.
        needed: its needs.
        held_out: rollouts to hold out, at least; whole prompts are.
        reading: of the same cache, signals and top-k, used up here; None reads the cache and keeps nothing.
        id_limit: rollouts with this id or a larger one are left out; None where all can be trained on.

    Raises:
        CacheError: a value is not finite, or the cache cannot serve a part; see `objectives.prepare`.
        ConfigError: no rollout would be left to train on.
    """
    prepared = prepare_rollouts(objective, cache_views(cache, needed, reading))
    parts = None if reading is None else reading.parts
    index = index_cache(cache, needed.signals, needed.topk, prepared, parts, needed.hidden)
    notes = list(prepared.notes)
    if id_limit is not None:
        index, without = _below(cache, index, id_limit)
        notes += [
            f"{without} rollouts have a token id of {id_limit} or more, which the student has no output for, "
            "and are left out"
        ] * bool(without)
    if needed.together:
        index, dropped = keep_prompts_whole(index)
        notes += [f"{dropped} rollouts lost their partner, which has no trained token"] * bool(dropped)
    if not held_out:
        return SelectedRollouts(index, None, tuple(notes))
    trained, validation = split(index, held_out)
    notes.append(f"{len(validation.row_P)} rollouts are held out")
    return SelectedRollouts(trained, validation, tuple(notes))


def refuse_ids_beyond(cache: Cache, width: int, student: str) -> None:
    """Refuse a cache with an id that the student has no output for; its sampler may have had more outputs.

    Raises:
        TrainingError: names the shard and the id.
    """
    for shard in cache.shards:
        largest = largest_id(cache, shard)
        if largest >= width:
            raise TrainingError(
                f"{cache.file(shard)} has token id {largest}, {student} has {width} outputs; "
                f"train a student that has it, or leave out the responses with such ids"
            )


def _below(cache: Cache, index: CacheIndex, limit: int) -> tuple[CacheIndex, int]:
    """The rollouts without an id of `limit` or more, and how many have one.

    Raises:
        ConfigError: every rollout has one.
    """
    beyond = {(shard, int(row)) for shard in cache.shards for row in rows_beyond(cache, shard, limit)}
    places = zip(index.shard_P.tolist(), index.row_P.tolist(), strict=True)
    kept_P = np.array([place not in beyond for place in places], bool)
    if not kept_P.any():
        raise ConfigError(
            f"every response of {cache.path} has a token id of {limit} or more, and the student has {limit} "
            "outputs; give the student an output for each with resize_token_embeddings, and save it"
        )
    return index.take(kept_P), int((~kept_P).sum())


def keep_prompts_whole(index: CacheIndex) -> tuple[CacheIndex, int]:
    """The rollouts of each prompt side by side; prompts that lost one are left out, and counted.

    Raises:
        CacheError: prompts have different numbers of rollouts.
    """
    _, first_U, group_P, counts_U = np.unique(
        index.groups_P, return_index=True, return_inverse=True, return_counts=True
    )
    size = int(counts_U.max(initial=1))
    is_whole_P = counts_U[group_P] == size
    dropped = int((~is_whole_P).sum())
    if dropped > index.num_left_out * max(1, size - 1):
        raise CacheError(
            f"the objective compares the rollouts of a prompt, and prompts have {int(counts_U.min())} to "
            f"{size} of them; sample the same number for each"
        )
    order_P = np.argsort(first_U[group_P], kind="stable")
    return index.take(order_P[is_whole_P[order_P]], size), dropped


def split(index: CacheIndex, held_out: int) -> tuple[CacheIndex, CacheIndex]:
    """(trained, held out): whole prompts are held out until they have `held_out` rollouts.

    Which prompts is decided by the hash of their ids, so that it is the same for every order and size of
    the shards.

    Raises:
        ConfigError: nothing is left to train on.
    """
    groups_U, counts_U = np.unique(index.groups_P, return_counts=True)
    chosen = int(np.searchsorted(counts_U.cumsum(), held_out)) + 1
    if chosen >= len(groups_U):
        raise ConfigError(
            f"held_out is {held_out}, and the {len(groups_U)} prompts have {len(index.row_P)} rollouts in "
            "all; hold out fewer, or roll out more"
        )
    is_held_P = index.groups_P <= groups_U[chosen - 1]
    size = index.group_size
    return index.take(~is_held_P, size), replace(index.take(is_held_P, size), num_left_out=0)
