"""Caches of one student and one contract made into one.

    lightopd cache merge runs/monday runs/tuesday --out runs/both

Signals that all have under one contract are kept; any other is refused unless it is left out by name.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightopd.cache.contexts import open_text, text_names
from lightopd.cache.manifests import Manifest, differing_fields, signal_names
from lightopd.cache.reader import check_rollouts
from lightopd.cache.store import Cache, content_id, open_cache
from lightopd.errors import CacheError, ConfigError, LineageError
from lightopd.lineage.checks import all_overrides
from lightopd.pipelines.caches.join_plan import Row, ShardRows, all_rows
from lightopd.pipelines.maintenance.carried import carry_signals, carry_text
from lightopd.pipelines.maintenance.remade import Remade, finish, made_beside, make_rollouts
from lightopd.pipelines.shared.reports import Report, override_notes, save_report
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.manifest import CacheManifest, SignalManifest, SourceCache, TextManifest


def merge(out: Path, paths: Sequence[Path], *, drop: Sequence[str] = ()) -> Report:
    """Make the cache `out` of all rollouts of some caches, with the signals and texts that they share.

    Args:
        out: cache folder that is created; killed at any moment, there is none, and the sources are untouched.
        paths: at least two caches, in the order of their shards in `out`.
        drop: signals and texts that are left out.

    Raises:
        ConfigError: fewer than two caches, one twice, or a name to leave out that none has.
        LineageError: the caches, or a signal that they share, were made under other contracts.
        CacheError: a source is incomplete or damaged, or has rollouts that another has.
        OutputError: `out` is there already, or cannot be written.
    """
    started_s = time.monotonic()
    if len({path.resolve() for path in paths}) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("merge needs two caches or more, none of them twice; name them before --out")
    names = [sorted({*signal_names(path)} - {*drop}) for path in paths]
    sources = [open_cache(path, signals=own) for path, own in zip(paths, names, strict=True)]
    texts = [sorted({*text_names(path)} - {*drop}) for path in paths]
    _refuse_unknown(paths, drop)
    _agree(sources, texts)
    for source in sources:
        check_rollouts(source)
    rows = list(all_rows(sources))
    plan = Remade(sources, _shards(sources), _first_samples(sources, rows))
    manifest = _manifest(sources, rows)
    with made_beside(out) as part:
        made = make_rollouts(part, manifest, plan)
        carry_signals(made, plan, names[0])
        for name in texts[0]:
            carry_text(made, plan, name)
        report = _report(finish(part), out, texts[0], started_s)
        save_report(report, part)
    return report


def _shards(sources: Sequence[Cache]) -> list[list[ShardRows]]:
    """Every shard as it is, those of the first source first."""
    return [
        [ShardRows(number, shard, list(range(source.marker(shard).rows)))]
        for number, source in enumerate(sources)
        for shard in source.shards
    ]


def _refuse_unknown(paths: Sequence[Path], drop: Sequence[str]) -> None:
    there = {name for path in paths for name in (*signal_names(path), *text_names(path))}
    if unknown := sorted({*drop} - there):
        raise ConfigError(
            f"--drop {unknown[0]}: no cache has it (there: {', '.join(sorted(there)) or 'none'})"
        )


def _agree(sources: Sequence[Cache], texts: Sequence[Sequence[str]]) -> None:
    """Refuse caches, signals and texts of different contracts, each difference named."""
    first = sources[0]
    for number, other in enumerate(sources[1:], 1):
        found = _differing(_contract(first.manifest), _contract(other.manifest))
        if found:
            raise LineageError(
                f"merge refused: {first.path} and {other.path} differ in {found}; merge caches that one "
                "student made under one sampling contract (seeds may differ)"
            )
        for names in ((first.signals, other.signals), (texts[0], texts[number])):
            lonely = sorted({*names[0]} ^ {*names[1]})
            if lonely:
                lacks = first.path if lonely[0] in names[1] else other.path
                raise LineageError(
                    f"merge refused: {lacks} has no {lonely[0]!r}; make it there, or leave it out with "
                    f"--drop {lonely[0]}"
                )
        for name in first.signals:
            pair = [source.signals[name].manifest for source in (first, other)]
            found = _differing(*map(_scored, pair))
            if not found and pair[0].sft_declared != pair[1].sft_declared:
                found = "sft_declared, the teacher that was declared for them"
            _refuse_other(name, first, other, found)
        for name in texts[0]:
            written = (_shown(open_text(source, name)) for source in (first, other))
            _refuse_other(name, first, other, _differing(*written))


def _refuse_other(name: str, one: Cache, other: Cache, found: str) -> None:
    if found:
        raise LineageError(
            f"merge refused: {name!r} of {one.path} and of {other.path} differ in {found}; make it again in "
            f"one of them, or leave it out with --drop {name}"
        )


def _differing(one: Manifest, other: Manifest) -> str:
    pairs = differing_fields(one, other).items()
    return ", ".join(f"{field} ({before!r} and {after!r})" for field, (before, after) in pairs)


def _contract(manifest: CacheManifest) -> CacheManifest:
    """A cache's manifest without what may differ between caches that are merged."""
    writers = {(each.origin, each.sampler.identity): each for each in manifest.joined}
    seedless = manifest.sampling and manifest.sampling.model_copy(update={"seed": 0})
    joined = tuple(writers[key].model_copy(update={"content": ""}) for key in sorted(writers))
    changed: dict[str, Any] = {
        "schema_version": 0,
        "sampling": seedless,
        "joined": joined,
        "made_of": (),
        "overrides": (),
    }
    changed |= {"prompts": "", "num_prompts": 0, "num_shards": 0, "shard_rollouts": 1}
    return manifest.model_copy(update=changed)


def _scored(manifest: SignalManifest) -> SignalManifest:
    """A signal's manifest without what may differ between signals that are merged."""
    changed: dict[str, Any] = {"schema_version": 0, "rollouts": "", "overrides": ()}
    changed["context"] = {**manifest.context, "prompts": ""}
    changed["support"] = manifest.support and {**manifest.support, "content": ""}
    if manifest.tail_shape is not None:
        changed["tail_shape"] = manifest.tail_shape.model_copy(update={"sha256": "", "tokens": 1})
    return manifest.model_copy(update=changed)


def _shown(manifest: TextManifest) -> TextManifest:
    changed: dict[str, Any] = {"schema_version": 0, "rollouts": "", "overrides": (), "prompts": ""}
    return manifest.model_copy(update=changed)


def _seeds(manifest: CacheManifest) -> set[int | None]:
    """Seeds that its rollouts were sampled with."""
    own = manifest.sampling.seed if manifest.sampling else None
    return set().union(*(each.seeds() for each in manifest.made_of)) if manifest.made_of else {own}


def _first_samples(sources: Sequence[Cache], rows: Sequence[Row]) -> dict[tuple[int, str], int]:
    """What is added to the numbers of samples whose prompt earlier sources have; none of equal seeds."""
    numbers: dict[str, dict[int, int]] = {}
    for row in rows:
        own = numbers.setdefault(row.prompt_id, {})
        own[row.cache] = max(own.get(row.cache, 0), row.sample_index + 1)
    added = {}
    for prompt, own in numbers.items():
        total = 0
        for number, count in sorted(own.items()):
            for one in (one for one in own if one < number):
                _refuse_twins(sources[one], sources[number], prompt)
            if total:
                added[number, prompt] = total
            total += count
    _refuse_copies(sources, [row for row in rows if (row.cache, row.prompt_id) not in added])
    return added


def _refuse_copies(sources: Sequence[Cache], rows: Sequence[Row]) -> None:
    """Refuse equal rollouts under two names of one prompt: their ids follow from content, and are equal."""
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(row.rollout_id, row)
        if other is not row:
            raise CacheError(
                f"{sources[other.cache].path} and {sources[row.cache].path} have one rollout, as "
                f"{other.prompt_id} and as {row.prompt_id}; give equal prompts one id, or leave one out"
            )


def _refuse_twins(one: Cache, other: Cache, prompt: str) -> None:
    if _seeds(one.manifest) & _seeds(other.manifest):
        raise CacheError(
            f"{one.path} and {other.path} both have prompt {prompt} under one seed, and would count its "
            "rollouts twice; merge caches of other prompts, or sample again with --set sampling.seed=..."
        )


def _manifest(sources: Sequence[Cache], rows: Sequence[Row]) -> CacheManifest:
    first = sources[0].manifest
    changed = {
        "schema_version": SCHEMA_VERSION,
        "joined": tuple(dict.fromkeys(each for source in sources for each in source.manifest.joined)),
        "made_of": tuple(source_of(source, source.num_rollouts) for source in sources),
        "prompts": canonical_hash([source.manifest.prompts for source in sources]),
        "num_prompts": len({row.prompt_id for row in rows}),
        "shard_rollouts": max(source.manifest.shard_rollouts for source in sources),
        "num_shards": sum(len(source.shards) for source in sources),
        "overrides": all_overrides([source.manifest.overrides for source in sources]),
    }
    return first.model_copy(update=changed)


def source_of(cache: Cache, rollouts: int, part: str | None = None) -> SourceCache:
    """What a new cache's manifest says of one that it is made of."""
    own = cache.manifest
    return SourceCache(
        content=content_id(cache, ()),
        source=str(cache.path),
        rollouts=rollouts,
        seed=own.sampling.seed if own.sampling else None,
        part=part,
        made_of=own.made_of,
    )


def _report(cache: Cache, out: Path, texts: Sequence[str], started_s: float) -> Report:
    return Report(
        "merge",
        str(out),
        {
            "rollouts": cache.num_rollouts,
            "response_tokens": cache.num_tokens,
            "prompts": cache.manifest.num_prompts,
            "shards": len(cache.shards),
            "signals": ", ".join(cache.signals) or "none",
            "texts": ", ".join(texts) or "none",
        },
        notes=override_notes(cache.manifest.overrides),
        seconds=time.monotonic() - started_s,
    )
