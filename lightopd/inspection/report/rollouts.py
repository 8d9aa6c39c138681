"""The rollouts that the viewer holds, packed: typed arrays and texts, gzipped and in base64.

Nothing of it stands in the page as text, so no rollout can close a tag or start a script.
"""

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightopd.cache.reader import ShardColumns, SignalColumns, read_columns, read_shard_columns
from lightopd.cache.store import Cache
from lightopd.inspection.opened import OpenedCache
from lightopd.inspection.token_texts import TokenTexts

UNITS_PER_NAT = 500
"""Log-probabilities travel as int16 in steps of 0.002 nats, down to -65.5."""
UNKNOWN = -32768
"""A log-probability that nobody measured."""
PROMPT_TOKENS = 2_000
"""Longest prompt that is shown, from its end."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rollouts of a page and how they were chosen."""

    ids: tuple[str, ...]
    sentence: str
    """How they were chosen, for people."""


def choose(opened: OpenedCache, cache: Cache, most: int, most_tokens: int) -> Chosen:
    """All rollouts where they fit; else half of them those with the largest mean gap, half by chance.

    Chance is the order of the ids, which are hashes: the same cache gives the same page.
    """
    if cache.num_rollouts <= most and cache.num_tokens <= most_tokens:
        rows = opened.sql("SELECT rollout_id FROM rollouts ORDER BY shard, row_in_shard").rows()
        return Chosen(tuple(row["rollout_id"] for row in rows), f"All {len(rows):,} rollouts.")
    ranked = opened.sql(
        """
        SELECT r.rollout_id, r.response_tokens, g.gap FROM rollouts AS r
        LEFT JOIN (SELECT rollout_id, avg(gap) AS gap FROM tokens WHERE loss_mask GROUP BY ALL) AS g
            USING (rollout_id) ORDER BY g.gap DESC NULLS LAST, r.rollout_id
        """
    ).rows()
    worst = _within(ranked, most // 2, most_tokens // 2)
    taken = {row["rollout_id"] for row in worst}
    rest = sorted(
        (row for row in ranked if row["rollout_id"] not in taken), key=lambda row: str(row["rollout_id"])
    )
    chance = _within(rest, most - len(worst), most_tokens - most_tokens // 2)
    ids = tuple(row["rollout_id"] for row in [*worst, *chance])
    return Chosen(
        ids,
        f"{len(ids):,} of {cache.num_rollouts:,} rollouts: the {len(worst):,} with the largest mean gap, and "
        f"{len(chance):,} by chance.",
    )


def _within(rows: list[dict[str, Any]], most: int, most_tokens: int) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        if len(taken) < most and (tokens + row["response_tokens"] <= most_tokens or not taken):
            taken.append(row)
            tokens += row["response_tokens"]
    return taken


def pack(opened: OpenedCache, cache: Cache, chosen: Chosen, top_k: int, token_limit: int) -> str:
    """The chosen rollouts as base64 of gzipped JSON, for the page's script.

    Args:
        opened: for the texts of tokens.
        cache: the same cache, opened now.
        chosen: which rollouts.
        top_k: entries of each signal that are kept at a position.
        token_limit: longest response that is kept; of a longer one its beginning.
    """
    plain = packed(opened, cache, chosen.ids, top_k, token_limit)
    raw = json.dumps(plain, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode("ascii")


def packed(
    opened: OpenedCache, cache: Cache, ids: tuple[str, ...], top_k: int, token_limit: int
) -> dict[str, Any]:
    """What the script reads: names of the signals, rollouts in the order given, and texts of the tokens."""
    found = {row["id"]: row for row in _rollouts(cache, set(ids), top_k, token_limit, opened.texts)}
    rows = [found[rollout_id] for rollout_id in ids if rollout_id in found]
    tokens = {token_id for row in rows for token_id in row.pop("seen")}
    return {
        "signals": list(cache.signals),
        "units": UNITS_PER_NAT,
        "roles": {name: signal.manifest.role for name, signal in cache.signals.items()},
        "texts": {str(token_id): opened.texts.token(token_id) for token_id in sorted(tokens)},
        "rollouts": rows,
    }


def _rollouts(
    cache: Cache, wanted: set[str], top_k: int, token_limit: int, texts: TokenTexts
) -> Iterator[dict[str, Any]]:
    for shard in cache.shards:
        names = [name for name, signal in cache.signals.items() if shard in signal.shards]
        ids = read_columns(cache, shard, ["rollout_id"]).column("rollout_id").to_pylist()
        rows = [row for row, rollout_id in enumerate(ids) if rollout_id in wanted]
        if not rows:
            continue
        columns = read_shard_columns(cache, shard, names)
        facts = read_columns(cache, shard, ["sample_index", "finish_reason", "answer"]).to_pylist()
        for row in rows:
            yield _rollout(columns, row, facts[row], top_k, token_limit, texts)


def _rollout(
    columns: ShardColumns, row: int, facts: dict[str, Any], top_k: int, token_limit: int, texts: TokenTexts
) -> dict[str, Any]:
    start, end = int(columns.offsets[row]), int(columns.offsets[row + 1])
    cut = min(end, start + token_limit)
    prompt_end = int(columns.prompt_offsets[row + 1])
    prompt = columns.prompt_ids_P[
        max(int(columns.prompt_offsets[row]), prompt_end - PROMPT_TOKENS) : prompt_end
    ]
    ids = columns.response_ids_N[start:cut]
    reward = float(columns.rewards_R[row])
    signals = {name: _signal(signal, start, cut, top_k) for name, signal in columns.signals.items()}
    seen = {*ids.tolist(), *(entry for signal in signals.values() for entry in signal.pop("seen"))}
    return {
        "id": columns.rollout_ids[row],
        "prompt": texts.decode(prompt),
        "prompt_id": columns.prompt_ids_by_user[row],
        "domain": columns.domains[row],
        "finish": facts["finish_reason"],
        "answer": facts["answer"],
        "sample": facts["sample_index"],
        "reward": None if np.isnan(reward) else round(reward, 6),
        "length": end - start,
        "ids": _array(ids.astype("<i4")),
        "mask": _array(columns.loss_mask_N[start:cut].astype("<u1")),
        "student": None if columns.logprobs_N is None else _nats(columns.logprobs_N[start:cut]),
        "entropy": None if columns.entropies_N is None else _nats(columns.entropies_N[start:cut]),
        "signals": signals,
        "seen": seen,
    }


def _signal(signal: SignalColumns, start: int, end: int, top_k: int) -> dict[str, Any]:
    assert signal.topk_offsets is not None
    assert signal.topk_ids_C is not None
    assert signal.topk_logprobs_C is not None
    assert signal.tail_logprobs_N is not None
    begins, ends = signal.topk_offsets[start:end], signal.topk_offsets[start + 1 : end + 1]
    counts = np.minimum(ends - begins, top_k)
    first = np.repeat(
        begins - np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else begins, counts
    )
    entries = first + np.arange(int(counts.sum()))
    ids = signal.topk_ids_C[entries]
    return {
        "logprobs": _nats(signal.logprobs_N[start:end]),
        "tail": _nats(signal.tail_logprobs_N[start:end]),
        "counts": _array(counts.astype("<u2")),
        "top_ids": _array(ids.astype("<i4")),
        "top": _nats(signal.topk_logprobs_C[entries]),
        "seen": set(ids.tolist()),
    }


def _nats(values: NDArray[np.float32]) -> str:
    """Nats as int16; what is not a number is `UNKNOWN`, minus infinity the least that can be said."""
    scaled = np.clip(np.nan_to_num(values, nan=0.0, neginf=-65.5, posinf=65.5) * UNITS_PER_NAT, -32767, 32767)
    return _array(np.where(np.isnan(values), UNKNOWN, np.rint(scaled)).astype("<i2"))


def _array(values: NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
