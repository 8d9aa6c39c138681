"""What a scoring pass would cost: tokens, bytes on disk, hours, before anything is paid."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from lightopd.cache.contexts import Contexts
from lightopd.cache.shards import shard_bytes
from lightopd.cache.store import Cache
from lightopd.cache.tables import scores_to_table
from lightopd.engines.base import Engine, SeesWholeTails
from lightopd.pipelines.shared.costs.choices import (
    LARGEST_LOSS_NATS,
    PRECISION,
    WIDEST,
    Sample,
    Whole,
    choice_row,
    fitting,
    named,
)
from lightopd.pipelines.shared.costs.disk import write_rate
from lightopd.pipelines.shared.costs.hidden import (
    SETTINGS,
    hidden_bytes,
    hidden_loss,
    hidden_row,
    hidden_size,
)
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.shared.sequences import (
    first_sequences,
    num_response_tokens,
    read_sequences,
    response_lengths,
)
from lightopd.schemas.configs import EngineConfig, ModelConfig, PrecomputeConfig
from lightopd.schemas.engines import MIN_SHAPE_TOKENS
from lightopd.schemas.manifest import SignalManifest
from lightopd.schemas.records import Sequence as TokenSequence

TRIAL_ROLLOUTS = 32
"""Rollouts that are scored to measure rate and size when no rate is given."""
SAMPLE_TOKENS = 2048
"""Response tokens that tell what each choice keeps and loses: half make the shape of the tail."""


def own_top_k(config: PrecomputeConfig) -> int:
    """Most likely tokens that the model itself adds at a position."""
    return 0 if config.support == "student" else config.top_k


def support_of(config: PrecomputeConfig) -> str | None:
    """Signal whose ids are scored as well; None for none."""
    return None if config.support == "teacher" else config.support_signal


def estimate(
    config: PrecomputeConfig,
    cache: Cache,
    manifest: SignalManifest,
    tokens_per_s: float | None,
    load: Callable[[EngineConfig, ModelConfig], Engine],
    contexts: Contexts | None,
) -> Report:
    """Tokens, bytes and hours of `precompute`, and what each choice of a signal would keep, lose and cost.

    With a given rate no model is loaded: the bytes are those of uncompressed columns, an upper bound, and
    nothing is known of other choices.
    """
    tokens = cache.num_tokens
    if config.horizon is not None:
        tokens = sum(response_lengths(cache, config.horizon).values())
    if tokens_per_s is None:
        trial = _measure(config, cache, load, contexts)
        basis = f"rate and size measured on {TRIAL_ROLLOUTS} rollouts"
    else:
        trial = _Trial(tokens_per_s, _columns_bytes(manifest))
        basis = "rate as given; bytes before compression, other choices not measured"
        basis += ", those of hidden states left out" if config.keep == "hidden" else ""
    disk = write_rate(config.cache)
    return Report(
        stage="precompute",
        out=str(config.cache),
        figures={
            "rollouts": cache.num_rollouts,
            "response_tokens": cache.num_tokens,
            **({} if config.horizon is None else {"scored_tokens": tokens}),
            "tokens_per_s": trial.tokens_per_s,
            "hours": tokens / trial.tokens_per_s / 3600,
            "bytes_per_token": trial.bytes_per_token,
            "bytes": int(tokens * trial.bytes_per_token),
            "disk_mb_per_s": None if disk is None else disk / 1e6,
            "needs_mb_per_s": trial.tokens_per_s * trial.bytes_per_token / 1e6,
        },
        notes=(f"dry run: nothing was kept; {basis}", *trial.notes, *_disk_notes(disk, trial)),
        rows=tuple(_with_costs(row, tokens, trial.tokens_per_s, disk) for row in trial.rows),
    )


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a few rollouts told."""

    tokens_per_s: float
    bytes_per_token: float
    rows: tuple[dict[str, JsonValue], ...] = ()
    notes: tuple[str, ...] = ()


def _measure(
    config: PrecomputeConfig,
    cache: Cache,
    load: Callable[[EngineConfig, ModelConfig], Engine],
    contexts: Contexts | None,
) -> _Trial:
    ids, sequences = read_sequences(cache, 0, contexts, support_of(config), config.horizon)
    ids, sequences = ids[:TRIAL_ROLLOUTS], sequences[:TRIAL_ROLLOUTS]
    engine = load(config.engine, config.teacher)
    try:
        engine.score(sequences[:1], own_top_k(config), config.min_probability)
        started_s = time.monotonic()
        scores = engine.score(sequences, own_top_k(config), config.min_probability)
        seconds = time.monotonic() - started_s
        sample, vocabulary = _sample(config, cache, engine, contexts), engine.vocabulary_size
        size = hidden_size(engine)
    finally:
        engine.close()
    tokens = max(1, num_response_tokens(sequences))
    content = shard_bytes(scores_to_table(ids, scores, config.topk_dtype), kind="trial", fingerprint="")
    hidden = hidden_bytes(size, config.hidden_format) if config.keep == "hidden" and size else 0
    rows, notes = _told(config, sample, vocabulary, size)
    return _Trial(tokens / max(seconds, 1e-9), len(content) / tokens + hidden, rows, notes)


def _sample(
    config: PrecomputeConfig, cache: Cache, engine: Engine, contexts: Contexts | None
) -> Sample | None:
    """Scored responses with as many entries as the engine gives; None where ids are not the model's own."""
    if config.support != "teacher":
        return None
    sequences = first_sequences(cache, SAMPLE_TOKENS, contexts, config.horizon)
    sees_all = isinstance(engine, SeesWholeTails)
    half = _half(sequences) if sees_all else 0
    first, rest = sequences[:half], sequences[half:]
    widest = min(WIDEST, engine.vocabulary_size) if sees_all else config.top_k
    names = [str(place) for place in range(len(rest))]
    measured = engine.score(rest, widest)
    if not isinstance(engine, SeesWholeTails):
        return Sample(names, measured, None)
    whole = Whole(engine.sum_tails(rest, 0), engine.sum_negentropies(rest))
    if not first:
        return Sample(names, measured, whole)
    shape, lost = Whole(engine.sum_tails(first, 0)), hidden_loss(engine, first, rest)
    return Sample(names, measured, whole, engine.score(first, widest), shape, lost)


def _half(sequences: list[TokenSequence]) -> int:
    """How many of the first sequences make the shape: half of the tokens; 0 where those are too few."""
    total, so_far = num_response_tokens(sequences), 0
    for place, sequence in enumerate(sequences):
        if so_far >= total / 2:
            return place if so_far >= MIN_SHAPE_TOKENS else 0
        so_far += len(sequence.response_ids)
    return 0


def _told(
    config: PrecomputeConfig, sample: Sample | None, vocabulary: int, size: int | None
) -> tuple[tuple[dict[str, JsonValue], ...], tuple[str, ...]]:
    """A row for each choice, and the sentences about them."""
    if sample is None:
        return (), (f"support: {config.support} keeps given ids: other choices were not measured",)
    choices = fitting(sample.measured, vocabulary)
    rows = tuple(choice_row(each, sample) for each in choices)
    settings = {each.name: each.settings for each in choices}
    if rows and size:
        rows = (*rows, hidden_row(rows[0], size, sample.hidden_loss))
        settings["hidden"] = SETTINGS
    tokens = sum(len(each.logprobs) for each in sample.measured)
    notes = [f"choices: measured on {tokens} response tokens; kl is nats of the teacher lost, at {PRECISION}"]
    if sample.whole is None:
        return rows, (
            *notes,
            f"engine {config.engine.kind} gives the most likely tokens only: what a choice loses is not "
            "known, nor which to name; engine hf tells",
        )
    if sample.calibration_whole is None:
        notes.append(f"fewer than {2 * MIN_SHAPE_TOKENS} response tokens: kl_shaped is not known")
    name = named(rows)
    if name is not None:
        rule = f"fewest bytes that lose at most {LARGEST_LOSS_NATS} nats, else the least loss"
        notes.append(f"would choose {name}: {settings[name]} ({rule})")
    return rows, tuple(notes)


def _with_costs(
    row: dict[str, JsonValue], tokens: int, tokens_per_s: float, disk: float | None
) -> dict[str, JsonValue]:
    """A row with its hours and the disk rate that it needs."""
    size = float(str(row[f"bytes_{PRECISION}"]))
    rate = tokens_per_s if disk is None else min(tokens_per_s, disk / size)
    needs = float(f"{tokens_per_s * size / 1e6:.3g}")
    return {**row, "hours": float(f"{tokens / rate / 3600:.3g}"), "mb_per_s": needs}


def _disk_notes(disk: float | None, trial: _Trial) -> list[str]:
    if disk is None:
        return ["the cache's folder cannot be written to: the disk's rate is not known"]
    if trial.tokens_per_s * trial.bytes_per_token > disk:
        return ["the disk is slower than the scoring: it decides the hours"]
    return []


def _columns_bytes(manifest: SignalManifest) -> float:
    """Sampled log-probability, tail and count at 4 bytes each, and `top_k` ids and values."""
    value_bytes = {"float32": 4, "float16": 2}.get(manifest.topk_dtype, 1)
    return 12 + manifest.top_k * (4 + value_bytes)
