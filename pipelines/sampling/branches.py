"""Rollouts cut where the student was least certain, continued by a model, and each continuation scored.

A branch is a number of a response's own ids that are kept, and perhaps another id put after them. What is
drawn from there is compared with the rollout's own ids (OmniOPD, arXiv 2606.01476), or the whole response is
graded by the prompt's verifier (arXiv 2605.10889).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from lightopd.cache.manifests import signal_names
from lightopd.cache.reader import read_columns
from lightopd.cache.signals.horizon import in_words
from lightopd.cache.store import Cache
from lightopd.cache.tables import split_lists
from lightopd.engines.base import Engine
from lightopd.errors import CacheError, ConfigError, InputError
from lightopd.pipelines.sampling.template_rows import TemplateRow
from lightopd.prompts.tokens import response_text
from lightopd.rewards.reward import reward_of
from lightopd.schemas.records import Bools, Floats, Ids, Prompt
from lightopd.schemas.rewriting import BranchConfig, RewriteConfig


@dataclass(frozen=True, slots=True)
class Branch:
    """One place of a rollout from which a model continues."""

    kept: int
    """Response ids before it."""
    chunk_count: int
    """The rollout's own ids that it stands against, from `kept` on."""
    forced: int | None
    """Id that is put there; None continues the response as it is."""

    def prefix(self, response_ids: Ids) -> Ids:
        """The response up to where the model continues."""
        put = [] if self.forced is None else [self.forced]
        return np.concatenate([response_ids[: self.kept], np.asarray(put, np.int32)]).astype(np.int32)


Branches = list[list[list[Branch]]]
"""Of each rollout, shard by shard."""


def read_signals(config: RewriteConfig) -> tuple[str, ...]:
    """Signals that say which tokens are put; one that is not there is refused by `plan_branches`."""
    wanted = config.branches
    puts = config.gives == "branches" and wanted.force and wanted.signal in signal_names(config.cache)
    return (wanted.signal,) if puts else ()


def plan_branches(config: RewriteConfig, cache: Cache, prompts: Mapping[str, Prompt]) -> Branches:
    """Where every rollout is cut, and what is put there; no model is asked.

    Raises:
        CacheError: no entropies of the student, or no signal with the ids that are to be put.
        InputError: a prompt has no verifier that could grade.
        ConfigError: the function that compares cannot be imported.
    """
    wanted = config.branches
    if ":" in wanted.score:
        similarity_by(wanted.score)
    if not wanted.compares and (lacking := [name for name, one in prompts.items() if one.verifier is None]):
        raise InputError(
            f"score: reward grades by the prompts' verifier, and prompt {lacking[0]} has none; give the "
            "prompts an `answer`, or score by similarity"
        )
    signal = cache.signals.get(wanted.signal)
    if wanted.force and signal is None:
        raise CacheError(
            f"{cache.path} has no signal {wanted.signal}, whose likeliest tokens are to be put; add it: "
            f"lightopd precompute --cache {cache.path} --teacher STUDENT --set role=self "
            f"--signal {wanted.signal} --top-k {max(8, wanted.force)}"
        )
    if signal is not None and signal.manifest.horizon is not None:
        raise CacheError(
            f"signal {wanted.signal} has ids of the {in_words(signal.manifest.horizon)} of responses, and "
            "branches cut anywhere; score it again under another name without a horizon"
        )
    if signal is not None and signal.manifest.top_k < wanted.force:
        raise CacheError(
            f"signal {wanted.signal} has {signal.manifest.top_k} entries at a position and force is "
            f"{wanted.force}; lower it, or score the signal again under another name with a larger top-k"
        )
    return [_of_shard(config, cache, shard) for shard in cache.shards]


def _of_shard(config: RewriteConfig, cache: Cache, shard: int) -> list[list[Branch]]:
    wanted, found = config.branches, []
    columns = read_columns(cache, shard, ["rollout_id", "entropies", "loss_mask"])
    if columns.column("entropies").null_count:
        raise CacheError(
            f"{cache.file(shard)} has rollouts without the student's entropies, which say where to cut; "
            "branch a cache of `lightopd rollout`"
        )
    length = config.sampling.max_tokens if wanted.compares else 1
    lists = (split_lists(columns.column(name)) for name in ("entropies", "loss_mask"))
    likeliest = _likeliest(cache, shard, wanted) if wanted.force else None
    for row, (entropies_N, loss_mask_N) in enumerate(zip(*lists, strict=True)):
        assert entropies_N is not None, "looked for above"
        assert loss_mask_N is not None, "never null on disk"
        chunks = entropy_peaks(entropies_N, loss_mask_N, wanted.places, length)
        if likeliest is None:
            found.append([Branch(kept, count, None) for kept, count in chunks])
        else:
            puts = ((chunk, put) for chunk in chunks for put in likeliest[row][chunk[0]].tolist())
            found.append([Branch(*chunk, put) for chunk, put in puts])
    return found


def entropy_peaks(entropies_N: Floats, loss_mask_N: Bools, places: int, length: int) -> list[tuple[int, int]]:
    """First token and size of the chunks at a response's highest entropies, in the order of the response.

    Chunks are of trained tokens alone, do not overlap, and have `length` tokens where so many are left.
    """
    is_free_N = loss_mask_N.copy()
    chunks: list[tuple[int, int]] = []
    for peak in np.argsort(-entropies_N.astype(np.float64), kind="stable").tolist():
        if len(chunks) == places:
            break
        run_N = is_free_N[peak : peak + length]
        count = len(run_N) if run_N.all() else int(run_N.argmin())
        whole_N = loss_mask_N[peak : peak + length]
        if not count or not (run_N == whole_N).all():
            continue
        is_free_N[peak : peak + count] = False
        chunks.append((peak, count))
    return sorted(chunks)


def _likeliest(cache: Cache, shard: int, wanted: BranchConfig) -> list[list[Ids]]:
    """Of each rollout and position, the ids to put, most likely first."""
    table = read_columns(cache, shard, ["topk_counts", "topk_ids"], wanted.signal)
    found = []
    for counts, ids in zip(*(split_lists(table.column(name)) for name in table.column_names), strict=True):
        assert counts is not None, "never null on disk"
        assert ids is not None, "never null on disk"
        ends = np.cumsum(counts)
        pairs = zip(ends - counts, counts, strict=True)
        found.append([ids[begin : begin + min(count, wanted.force)] for begin, count in pairs])
    return found


def check_room(branches: Branches, rows: list[list[TemplateRow]], shown: list[list[Ids]], limit: int) -> None:
    """Refuse a branch that leaves no room for a single token.

    Raises:
        InputError: names the first such rollout.
    """
    for of_shard, some, prompts in zip(branches, rows, shown, strict=True):
        for own, row, prompt in zip(of_shard, some, prompts, strict=True):
            needed = max((len(prompt) + one.kept + (one.forced is not None) + 1 for one in own), default=0)
            if needed > limit:
                raise InputError(
                    f"rollout {row.rollout_id}: prompt and kept response need {needed} tokens and the "
                    f"model's context is {limit}; shorten the template"
                )


def branch_columns(
    config: RewriteConfig,
    engine: Engine,
    rows: Sequence[TemplateRow],
    shown: Sequence[Ids],
    branches: Sequence[Sequence[Branch]],
    prompts: Mapping[str, Prompt],
    tokenizer: Any,
    stops: Sequence[int],
) -> list[Sequence[Any]]:
    """Columns of a shard of `BRANCHES` after the prompts, drawn and scored."""
    draws = range(config.sampling.n)
    asked = [(row, one, draw) for row, own in enumerate(branches) for one in own for draw in draws]
    drawn = _drawn(config, engine, rows, shown, asked, stops)
    ids: list[list[Ids]] = [[] for _ in rows]
    scores: list[list[float]] = [[] for _ in rows]
    for (row, one, _), continuation in zip(asked, drawn, strict=True):
        ids[row].append(continuation)
        scores[row].append(_score(config.branches, rows[row], one, continuation, prompts, tokenizer))
    nothing: list[Any] = [None] * len(rows)
    means = [float(np.mean(own)) if own else None for own in scores]
    return [
        [np.concatenate([*own, np.zeros(0, np.int32)]).astype(np.int32) for own in ids],
        nothing,
        nothing,
        means,
        [[one.kept for one in own] for own in branches],
        [[one.chunk_count for one in own] for own in branches],
        [[one.forced for one in own] for own in branches],
        [[len(each) for each in own] for own in ids],
        scores,
    ]


def _drawn(
    config: RewriteConfig,
    engine: Engine,
    rows: Sequence[TemplateRow],
    shown: Sequence[Ids],
    asked: Sequence[tuple[int, Branch, int]],
    stops: Sequence[int],
) -> list[Ids]:
    """Ids of each continuation; none after an end token that was put, which ends the response."""
    going = [place for place, (_, one, _) in enumerate(asked) if one.forced not in stops]
    prefixes, keys = [], []
    for row, one, draw in (asked[place] for place in going):
        prefixes.append(np.concatenate([shown[row], one.prefix(rows[row].response_ids)]))
        keys.append(f"{rows[row].rollout_id}/{one.kept}/{one.forced}/{draw}")
    found = [np.zeros(0, np.int32)] * len(asked)
    samples = engine.generate(prefixes, config.sampling, keys, stops) if going else []
    for place, sample in zip(going, samples, strict=True):
        found[place] = sample.response_ids
    return found


def _score(
    wanted: BranchConfig,
    row: TemplateRow,
    one: Branch,
    continuation: Ids,
    prompts: Mapping[str, Prompt],
    tokenizer: Any,
) -> float:
    whole = np.concatenate([one.prefix(row.response_ids), continuation])
    if wanted.score == "reward":
        reward = reward_of(prompts[row.prompt_id], response_text(whole, tokenizer))
        assert reward is not None, "prompts without a verifier were refused"
        return reward
    own = row.response_ids[one.kept : one.kept + one.chunk_count]
    if wanted.score == "similarity":
        return shared_runs(whole[one.kept :], own)
    texts = [response_text(ids, tokenizer) for ids in (whole[one.kept :], own)]
    value = float(similarity_by(wanted.score)(*texts))
    if not 0.0 <= value <= 1.0:
        raise InputError(
            f"{wanted.score} returned {value} for rollout {row.rollout_id}; a similarity lies within 0 and 1"
        )
    return value


def shared_runs(drawn: Ids, own: Ids) -> float:
    """Twice the ids in runs that both have in the same order, over the ids of both; 1 where equal."""
    return SequenceMatcher(None, drawn.tolist(), own.tolist(), autojunk=False).ratio()


@lru_cache(maxsize=8)
def similarity_by(name: str) -> Callable[[str, str], float]:
    """The user's function of two texts.

    Raises:
        ConfigError: its module or it does not exist.
    """
    module, _, function = name.partition(":")
    try:
        found: Callable[[str, str], float] = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"branches.score {name!r} cannot be imported ({error}); check the name and PYTHONPATH"
        ) from error
    return found
