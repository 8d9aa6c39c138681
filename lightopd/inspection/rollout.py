"""One rollout with its signals, token by token, for people."""

import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightopd.cache.reader import ShardColumns, SignalColumns, read_columns, read_shard_columns
from lightopd.cache.store import Cache
from lightopd.inspection.token_texts import TokenTexts
from lightopd.schemas.records import Floats
from lightopd.text_tables import visible

SHOWN_TOKENS = 400
"""Tokens that a notebook shows of a rollout."""
FULL_COLOUR_NATS = 4.0
"""Difference at which a token has its full colour."""
BLUE, ORANGE = "33, 114, 196", "214, 106, 12"
"""The teacher finds the token likelier, or less likely, than the student did; apart for colour-blind eyes."""


@dataclass(frozen=True, slots=True)
class RolloutView:
    """A rollout's text, tokens and signals."""

    rollout_id: str
    prompt: str
    """The prompt's tokens as text."""
    response: str
    """The response's tokens as text, the end token included."""
    tokens: tuple[str, ...]
    """Text of each response token."""
    token_ids: tuple[int, ...]
    facts: dict[str, Any]
    """prompt_id, domain, finish_reason, reward, answer."""
    logprobs: Floats | None
    """float32 [R], nats, student at rollout; None where it is unknown."""
    entropies: Floats | None
    """float32 [R], nats."""
    signals: dict[str, Floats]
    """float32 [R], nats, of each signal's log-probability of the sampled token; NaN behind its horizon."""
    topk: dict[str, tuple[tuple[tuple[str, float], ...], ...]]
    """By signal and position: (token, probability), most likely first."""

    def gap(self, signal: str | None = None) -> Floats | None:
        """Student minus signal log-probability, nats, [R]; of the first signal when none is named."""
        name = signal or next(iter(self.signals), None)
        if name is None or self.logprobs is None:
            return None
        return self.logprobs - self.signals[name]

    def __repr__(self) -> str:
        gap = self.gap()
        mean = "" if gap is None or not len(gap) else f", gap {np.nanmean(gap):.3f} nats/token"
        told = ", ".join(f"{name} {value}" for name, value in self.facts.items() if value is not None)
        text = visible(self.response)
        short = text if len(text) <= 300 else f"{text[:300]}..."
        return f"rollout {self.rollout_id} ({len(self.tokens)} tokens{mean}; {visible(told)})\n{short}"

    def _repr_html_(self) -> str:
        gap = self.gap()
        spans = [
            _span(token, None if gap is None else -float(gap[place]), _hover(self, place))
            for place, token in enumerate(self.tokens[:SHOWN_TOKENS])
        ]
        more = len(self.tokens) - SHOWN_TOKENS
        rest = f"<p>... and {more:,} more tokens</p>" if more > 0 else ""
        legend = "<small>blue: the signal finds the token likelier than the student did; orange: less</small>"
        head = f"<b>{html.escape(self.rollout_id)}</b> {legend}"
        return f'<div>{head}<pre style="white-space:pre-wrap">{"".join(spans)}</pre>{rest}</div>'


def read_rollout(cache: Cache, shard: int, row: int, texts: TokenTexts) -> RolloutView:
    """Read one row of a shard, with every signal that has the shard.

    Raises:
        CacheError: a file is damaged.
    """
    names = [name for name, signal in cache.signals.items() if shard in signal.shards]
    columns = read_shard_columns(cache, shard, names)
    start, end = int(columns.offsets[row]), int(columns.offsets[row + 1])
    prompt = slice(int(columns.prompt_offsets[row]), int(columns.prompt_offsets[row + 1]))
    ids = tuple(columns.response_ids_N[start:end].tolist())
    return RolloutView(
        rollout_id=columns.rollout_ids[row],
        prompt=texts.decode(columns.prompt_ids_P[prompt]),
        response=texts.decode(ids),
        tokens=tuple(map(texts.token, ids)),
        token_ids=ids,
        facts=_facts(cache, shard, row, columns),
        logprobs=None if columns.logprobs_N is None else columns.logprobs_N[start:end],
        entropies=None if columns.entropies_N is None else columns.entropies_N[start:end],
        signals={name: signal.logprobs_N[start:end] for name, signal in columns.signals.items()},
        topk={name: _topk(signal, start, end, texts) for name, signal in columns.signals.items()},
    )


def _facts(cache: Cache, shard: int, row: int, columns: ShardColumns) -> dict[str, Any]:
    names = ["prompt_id", "domain", "finish_reason", "reward", "answer"]
    found = read_columns(cache, shard, names).slice(row, 1).to_pylist()[0]
    return {name: found[name] for name in names}


def _topk(
    signal: SignalColumns, start: int, end: int, texts: TokenTexts
) -> tuple[tuple[tuple[str, float], ...], ...]:
    assert signal.topk_offsets is not None
    assert signal.topk_ids_C is not None
    assert signal.topk_logprobs_C is not None
    probabilities_C = np.exp(signal.topk_logprobs_C.astype(np.float64))
    offsets = signal.topk_offsets
    return tuple(
        tuple(
            (texts.token(int(signal.topk_ids_C[entry])), float(probabilities_C[entry]))
            for entry in range(int(offsets[place]), int(offsets[place + 1]))
        )
        for place in range(start, end)
    )


def _span(token: str, nats: float | None, hover: str) -> str:
    strength = 0.0 if nats is None or math.isnan(nats) else min(abs(nats) / FULL_COLOUR_NATS, 1.0) * 0.7
    colour = BLUE if nats is not None and nats > 0 else ORANGE
    text = html.escape(visible(token)) + ("\n" if token == "\n" else "")
    return (
        f'<span title="{html.escape(hover)}" style="background:rgba({colour},{strength:.2f})">{text}</span>'
    )


def _hover(rollout: RolloutView, place: int) -> str:
    lines = [f"token {place}: {visible(rollout.tokens[place])}"]
    if rollout.logprobs is not None:
        lines.append(f"student {math.exp(rollout.logprobs[place]):.4f}")
    for name, values in rollout.signals.items():
        known = not math.isnan(values[place])
        lines.append(f"{name} {math.exp(values[place]):.4f}" if known else f"{name}: behind its horizon")
        lines += [f"  {visible(text)}  {share:.4f}" for text, share in rollout.topk[name][place][:8]]
    return "\n".join(lines)
