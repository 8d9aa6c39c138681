"""`lightopd methods diagnose`: does a signal's gradient point where responses become right?

At a cut of a rollout (`lightopd rewrite --gives branches`, force 2 or more, score reward) the student's
likeliest tokens were put one by one and continued. J = tokens put at a cut, P their probabilities under the
student, Q their mean scores. By the logits, success rises fastest along P (Q - E_P Q), and a divergence from
a signal T falls along P (f - E_P f): f = log T/s for KL(s || T), T/s for KL(T || s). Their cosine is 1 where
the signal teaches what helps and -1 where it teaches the opposite.

Source: arXiv 2605.10889, read in its abstract and in notes by others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightopd.cache.contexts import open_text, read_texts
from lightopd.cache.reader import read_columns
from lightopd.cache.store import Cache
from lightopd.cache.tables import split_lists
from lightopd.errors import CacheError
from lightopd.pipelines.sampling.template_rows import RIGHT_AT

Doubles = NDArray[np.float64]

DIVERGENCES = ("reverse_kl", "forward_kl")


def gradient(student_J: Doubles, values_J: Doubles) -> Doubles:
    """P (v - E_P v), [J]: how the mean of `values_J` under the student rises with its logits.

    Args:
        student_J: log-probabilities of the student; they are normalised over the J tokens here.
        values_J: of each token.
    """
    share_J = np.exp(student_J - student_J.max())
    share_J /= share_J.sum()
    return np.asarray(share_J * (values_J - share_J @ values_J))


def cosine(student_J: Doubles, success_J: Doubles, credit_J: Doubles) -> float:
    """Cosine of the ideal and the distilled gradient; NaN where either is zero, to rounding.

    Args:
        student_J: log-probabilities of the student.
        success_J: probability of a right response after each token.
        credit_J: what the divergence gives each token, f above.
    """
    if np.ptp(success_J) < 1e-9 or np.ptp(credit_J) < 1e-9:
        return float("nan")
    ideal_J, distilled_J = gradient(student_J, success_J), gradient(student_J, credit_J)
    return float(ideal_J @ distilled_J / (np.linalg.norm(ideal_J) * np.linalg.norm(distilled_J)))


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut of a rollout, with the tokens that were put there."""

    rollout: int
    """Number of the rollout."""
    is_right: bool
    cosines: dict[tuple[str, str], float]
    """By signal and divergence, NaN where there is none."""
    left_out: dict[str, int]
    """Tokens that a signal's top-k does not hold."""


@dataclass(frozen=True, slots=True)
class Alignment:
    """What all cuts of a cache say."""

    cuts: int
    flat: int
    """Cuts at which every token that was put led to the same score, so that nothing is to be learnt."""
    rows: tuple[dict[str, Any], ...]
    """By signal, divergence and outcome of the rollout: number of cuts, mean cosine, its standard error."""
    left_out: dict[str, int]
    """By signal, tokens outside its top-k."""


def measure_alignment(cache: Cache, name: str) -> Alignment:
    """Cosines of every other signal's gradient with the ideal one.

    Args:
        cache: complete, with the signal of the student whose tokens were put, and one more with a top-k.
        name: of the text column of branches.

    Raises:
        CacheError: the column has no put tokens or no grades, or no signal could teach.
    """
    wanted = open_text(cache, name).branches
    if wanted is None or wanted.force < 2 or wanted.compares:
        raise CacheError(
            f"text {name} of {cache.path} has no graded tokens; make it with `lightopd rewrite --gives "
            f"branches --set branches.force=4 --set branches.score=reward` under another name"
        )
    taught = [
        one for one, signal in cache.signals.items() if one != wanted.signal and signal.manifest.top_k > 1
    ]
    if wanted.signal not in cache.signals or not taught:
        there = ", ".join(cache.signals) or "none"
        raise CacheError(
            f"{cache.path} needs signal {wanted.signal} and a teacher's, both with a top-k (there: {there}); "
            f"add it: lightopd precompute --cache {cache.path} --teacher MODEL --top-k 32"
        )
    cuts = [cut for shard in cache.shards for cut in _cuts(cache, shard, name, wanted.signal, taught)]
    flat = sum(all(np.isnan(value) for value in cut.cosines.values()) for cut in cuts)
    left_out = {signal: sum(cut.left_out[signal] for cut in cuts) for signal in taught}
    return Alignment(len(cuts), flat, tuple(_rows(cuts, taught)), left_out)


def _rows(cuts: Sequence[Cut], taught: Sequence[str]) -> Iterator[dict[str, Any]]:
    for signal in taught:
        for divergence in DIVERGENCES:
            for rollouts, wanted in (("all", (True, False)), ("right", (True,)), ("wrong", (False,))):
                found: dict[int, list[float]] = {}
                for cut in cuts:
                    value = cut.cosines[signal, divergence]
                    if cut.is_right in wanted and not np.isnan(value):
                        found.setdefault(cut.rollout, []).append(value)
                means = np.array([np.mean(values) for values in found.values()])
                yield {
                    "signal": signal,
                    "divergence": divergence,
                    "rollouts": rollouts,
                    "cuts": sum(map(len, found.values())),
                    "cosine": float(means.mean()) if len(means) else None,
                    "error": float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None,
                }


def _cuts(cache: Cache, shard: int, name: str, own: str, taught: Sequence[str]) -> Iterator[Cut]:
    """Every cut of a shard."""
    texts = read_texts(cache, name, shard)
    rewards = read_columns(cache, shard, ["reward"]).column("reward").to_pylist()
    lists = (split_lists(texts.column(one)) for one in ("places", "forced_ids", "scores"))
    tables = {signal: _topk(cache, shard, signal) for signal in (own, *taught)}
    for row, (places, ids, scores) in enumerate(zip(*lists, strict=True)):
        if places is None or ids is None or scores is None or not len(places):
            continue
        success_B = scores.reshape(len(places), -1).mean(1).astype(np.float64)
        for place in np.unique(places).tolist():
            here_B = places == place
            known = {signal: _at(table[row], place) for signal, table in tables.items()}
            found = {
                signal: _cosines(known, own, signal, ids[here_B], success_B[here_B]) for signal in taught
            }
            yield Cut(
                rollout=shard << 32 | row,
                is_right=rewards[row] is not None and rewards[row] >= RIGHT_AT,
                cosines={(signal, one): found[signal][0][one] for signal in taught for one in DIVERGENCES},
                left_out={signal: found[signal][1] for signal in taught},
            )


def _cosines(
    known: dict[str, dict[int, float]], own: str, signal: str, ids: NDArray[Any], success_J: Doubles
) -> tuple[dict[str, float], int]:
    """Cosine by divergence over the tokens that both hold, and how many tokens the signal does not hold."""
    is_held_J = np.array([int(token) in known[signal] for token in ids])
    held = [int(token) for token in ids[is_held_J]]
    student_J = np.array([known[own][token] for token in held])
    log_ratio_J = np.array([known[signal][token] for token in held]) - student_J
    credits = {"reverse_kl": log_ratio_J, "forward_kl": np.exp(log_ratio_J)}
    if len(held) < 2:
        return dict.fromkeys(DIVERGENCES, float("nan")), int((~is_held_J).sum())
    values = {one: cosine(student_J, success_J[is_held_J], credits[one]) for one in DIVERGENCES}
    return values, int((~is_held_J).sum())


def _topk(cache: Cache, shard: int, signal: str) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Of each rollout: where each position's entries begin and end, their ids, their log-probabilities."""
    table: pa.Table = read_columns(cache, shard, ["topk_counts", "topk_ids", "topk_logprobs"], signal)
    found = []
    for counts, ids, logprobs in zip(*map(split_lists, table.columns), strict=True):
        assert counts is not None, "never null on disk"
        assert ids is not None, "never null on disk"
        assert logprobs is not None, "never null on disk"
        found.append((np.concatenate([[0], np.cumsum(counts)]), ids, logprobs))
    return found


def _at(topk: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], place: int) -> dict[int, float]:
    """Log-probability by id at a position."""
    begins, ids, logprobs = topk
    if place + 1 >= len(begins):  # behind the signal's horizon
        return {}
    entries = slice(begins[place], begins[place + 1])
    return dict(zip(ids[entries].tolist(), logprobs[entries].tolist(), strict=True))
