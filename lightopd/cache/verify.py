"""Is a cache what its manifests say? Every check that needs no model; findings name file and row.

Shards are read one by one and checked in blocks of rows, so memory stays at one shard. Within a shard each
check reports its first row and how many places failed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from lightopd.cache.contexts import CONTEXTS, read_contexts, read_texts, text_folder, text_names
from lightopd.cache.manifests import (
    differing,
    orphaned_signals,
    read_manifest,
    restoring,
    rollouts_folder,
    signal_folder,
    signal_names,
)
from lightopd.cache.row_checks import Fault, rollout_faults, score_faults
from lightopd.cache.shards import AGAIN, marker_path, read_marker, read_table, shard_path, why_invalid
from lightopd.cache.signals.hidden_checks import hidden_faults
from lightopd.cache.signals.tail_shape import TAIL_SHAPE, read_shape
from lightopd.cache.store import open_cache, row_count_fault, streams_of
from lightopd.errors import CacheError, LineageError
from lightopd.lineage.checks import check_student, check_teacher, check_tokenizer
from lightopd.schemas.cache import ROLLOUTS, SIGNALS, signal_columns
from lightopd.schemas.manifest import CACHE_MANIFEST, SIGNAL_MANIFEST, CacheManifest, SignalManifest

if TYPE_CHECKING:
    from lightopd.cache.signals.rebuilt import Rebuilder


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a cache that is not as it must be."""

    file: str
    """Path relative to the cache folder."""
    row: int | None
    """Row of the file, from 0; None where it is about the whole file."""
    what: str
    """What is wrong, in words."""

    def __str__(self) -> str:
        return f"{self.file}{'' if self.row is None else f' row {self.row}'}: {self.what}"


@dataclass(frozen=True, slots=True)
class _Part:
    """One folder of shards and what its files must be."""

    folder: Path
    kind: str
    fingerprint: str
    schema: pa.Schema


def verify(path: Path) -> list[Finding]:
    """Check a whole cache: files, checksums, schemas, counts, ids, alignment, lengths, ranges, lineage.

    Returns:
        Findings, in the order of the shards; empty for a sound cache. A missing shard is a finding too.

    Raises:
        CacheError: the folder is not a cache.
    """
    if streams := streams_of(path):
        return [Finding(str(path), None, stream) for stream in streams]
    if not (path / CACHE_MANIFEST).is_file():
        open_cache(path)
    try:
        manifest = read_manifest(path / CACHE_MANIFEST, CacheManifest)
    except CacheError as error:
        return [Finding(CACHE_MANIFEST, None, str(error))]
    signals, findings = _signal_manifests(path)
    findings += [finding for signal in signals for finding in _lineage_findings(manifest, signal)]
    findings += [finding for signal in signals for finding in _context_findings(path, signal)]
    findings += [finding for signal in signals for finding in _shape_findings(path, manifest, signal)]
    findings += _text_findings(path)
    findings += _stray_shards(path, manifest, signals)
    findings += [Finding(CACHE_MANIFEST, None, what) for what in _count_faults(path, manifest)]
    findings += _manifest_findings(path, manifest, signals)
    rebuilders, own = _rebuilders(path, manifest, signals)
    findings += own
    seen: set[str] = set()
    for index in range(manifest.num_shards):
        findings += _shard_findings(path, index, manifest, signals, rebuilders, seen)
    return findings


def _signal_manifests(path: Path) -> tuple[list[SignalManifest], list[Finding]]:
    manifests, findings = [], []
    for name in signal_names(path):
        file = signal_folder(path, name) / SIGNAL_MANIFEST
        try:
            manifest = read_manifest(file, SignalManifest)
        except CacheError as error:
            findings.append(Finding(str(file.relative_to(path)), None, str(error)))
            continue
        if manifest.name == name:
            manifests.append(manifest)
        else:
            findings.append(
                Finding(
                    str(file.relative_to(path)),
                    None,
                    f"it names the signal {manifest.name!r}, not its folder",
                )
            )
    for name in orphaned_signals(path):
        folder = signal_folder(path, name)
        what = f"it is missing, beside shards of the signal; {restoring(path, name)}"
        findings.append(Finding(str((folder / SIGNAL_MANIFEST).relative_to(path)), None, what))
    return manifests, findings


def _lineage_findings(manifest: CacheManifest, signal: SignalManifest) -> Iterator[Finding]:
    file = str(signal_folder(Path(), signal.name) / SIGNAL_MANIFEST)
    if signal.rollouts != manifest.fingerprint():
        yield Finding(
            file,
            None,
            f"it scored rollouts {signal.rollouts[:12]}, the cache is {manifest.fingerprint()[:12]}",
        )
    overridden = {override.allowed for override in signal.overrides}
    try:
        if signal.role == "teacher":
            check_teacher(signal.sft_declared or manifest.sft, signal.model, overridden, "verify")
        if signal.role == "self" and signal.model is not None:
            check_student(manifest.sampler, signal.model, overridden, "verify")
        if signal.tokenizer is not None:
            check_tokenizer(manifest.tokenizer, signal.tokenizer, overridden, "verify")
    except LineageError as error:
        what = str(error).removeprefix("verify refused: ").partition("; ")[0]
        yield Finding(file, None, f"{what}, and no override says so")


def _context_findings(path: Path, signal: SignalManifest) -> Iterator[Finding]:
    folder = signal_folder(path, signal.name)
    try:
        read_contexts(folder, signal.context)
    except CacheError as error:
        yield Finding(str((folder / CONTEXTS).relative_to(path)), None, str(error))


def _shape_findings(path: Path, manifest: CacheManifest, signal: SignalManifest) -> Iterator[Finding]:
    if signal.tail_shape is None:
        return
    folder = signal_folder(path, signal.name)
    file = folder / TAIL_SHAPE
    try:
        read_shape(folder, signal.tail_shape, manifest.vocabulary_size)
    except CacheError as error:
        what = str(error).removeprefix(str(file)).lstrip(": ")
        yield Finding(str(file.relative_to(path)), None, what)


def _rebuilders(
    path: Path, manifest: CacheManifest, signals: list[SignalManifest]
) -> "tuple[dict[str, Rebuilder], list[Finding]]":
    """What holds hidden states against log-probabilities, by signal, and why it cannot be had."""
    rebuilders, findings = {}, []
    kept = [signal for signal in signals if signal.hidden is not None]
    if kept:  # torch is read for them alone
        from lightopd.cache.signals.rebuilt import rebuilder_of
    for signal in kept:
        try:
            rebuilders[signal.name] = rebuilder_of(path, signal, manifest.vocabulary_size)
        except CacheError as error:
            file, _, what = str(error).removeprefix(f"{path}/").partition(" ")
            findings.append(Finding(file.rstrip(":"), None, what))
    return rebuilders, findings


def _text_findings(path: Path) -> Iterator[Finding]:
    """Text columns that cannot be read beside the rollouts, one finding for each."""
    names = text_names(path)
    try:
        cache = open_cache(path, signals=()) if names else None
    except CacheError:  # the rollouts' own findings say why
        return
    for name in names if cache else ():
        assert cache is not None, "there are names"
        try:
            for shard in cache.shards:
                read_texts(cache, name, shard)
        except CacheError as error:
            yield Finding(str(text_folder(path, name).relative_to(path)), None, str(error))


def _manifest_findings(
    path: Path, manifest: CacheManifest, signals: list[SignalManifest]
) -> Iterator[Finding]:
    """Manifests that all markers of their folder, which agree with each other, do not know."""
    parts = [(CACHE_MANIFEST, rollouts_folder(path), manifest.fingerprint())]
    for signal in signals:
        folder = signal_folder(path, signal.name)
        parts.append((str((folder / SIGNAL_MANIFEST).relative_to(path)), folder, signal.fingerprint()))
    for file, folder, fingerprint in parts:
        markers = [read_marker(folder, index) for index in range(manifest.num_shards)]
        found = [marker.fingerprint for marker in markers if marker is not None]
        if len(set(found)) == 1 and found[0] != fingerprint:
            theirs, own = differing(found[0], fingerprint)
            what = f"it is {own}, all markers speak of {theirs}: the manifest was changed; copy it again"
            yield Finding(file, None, what)


def _count_faults(path: Path, manifest: CacheManifest) -> Iterator[str]:
    markers = [read_marker(rollouts_folder(path), index) for index in range(manifest.num_shards)]
    fault = row_count_fault(manifest, [marker for marker in markers if marker is not None])
    if fault and None not in markers:
        yield fault


def _stray_shards(path: Path, manifest: CacheManifest, signals: list[SignalManifest]) -> Iterator[Finding]:
    folders = [rollouts_folder(path), *(signal_folder(path, signal.name) for signal in signals)]
    for folder in folders:
        known = {shard_path(folder, index) for index in range(manifest.num_shards)}
        for file in sorted(set(folder.glob("part-*.parquet")) - known):
            what = f"it is not one of the cache's {manifest.num_shards} shards; delete it"
            yield Finding(str(file.relative_to(path)), None, what)


def _shard_findings(
    path: Path,
    index: int,
    manifest: CacheManifest,
    signals: list[SignalManifest],
    rebuilders: "Mapping[str, Rebuilder]",
    seen: set[str],
) -> list[Finding]:
    """Everything about one shard of rollouts and of each signal; `seen` gathers the rollout ids."""
    part = _Part(rollouts_folder(path), "rollouts", manifest.fingerprint(), ROLLOUTS)
    rollouts, findings = _load(path, part, index)
    file = str(shard_path(part.folder, index).relative_to(path))
    if rollouts is not None:
        findings += _merged(file, rollout_faults(rollouts, manifest, seen))
    for signal in signals:
        folder = signal_folder(path, signal.name)
        schema = signal_columns(signal.hidden)
        part = _Part(folder, f"signals/{signal.name}", signal.fingerprint(), schema)
        scores, own = _load(path, part, index)
        findings += own
        if scores is not None and rollouts is not None:
            file = str(shard_path(folder, index).relative_to(path))
            faults = score_faults(scores.select(SIGNALS.names), rollouts, signal, manifest.vocabulary_size)
            findings += _merged(file, faults)
            findings += _merged(file, _state_faults(scores, rollouts, signal, rebuilders.get(signal.name)))
    return findings


def _state_faults(
    scores: pa.Table, rollouts: pa.Table, signal: SignalManifest, rebuilder: "Rebuilder | None"
) -> Iterator[Fault]:
    """Faults in hidden states: in their form, else in what the head rebuilds of them."""
    if signal.hidden is None or scores.num_rows != rollouts.num_rows:
        return
    found = list(hidden_faults(scores, rollouts, signal.hidden))
    yield from found
    if not found and rebuilder is not None:
        yield from rebuilder.faults(scores, rollouts)


def _load(path: Path, part: _Part, index: int) -> tuple[pa.Table | None, list[Finding]]:
    """A shard's table, or None and the reasons why it cannot be looked into."""
    file = shard_path(part.folder, index)
    name = str(file.relative_to(path))
    if not file.exists() and not marker_path(part.folder, index).exists():
        return None, [Finding(name, None, "the shard is missing; run the stage that makes it again")]
    reason = why_invalid(part.folder, index, part.fingerprint)
    if reason:
        return None, [Finding(name, None, f"{reason}; copy it again, or delete its marker and make it again")]
    marker = read_marker(part.folder, index)
    assert marker is not None, "without one it is not valid"
    try:
        table = read_table(file, part.kind, marker, part.schema.names)
    except CacheError as error:
        return None, [Finding(name, None, str(error).removeprefix(f"{file} ").removesuffix(f"; {AGAIN}"))]
    column = "response_ids" if part.kind == "rollouts" else "logprobs"
    tokens = sum(len(chunk.flatten()) for chunk in table.column(column).chunks)
    if (table.num_rows, tokens) == (marker.rows, marker.tokens):
        return table, []
    found = f"{table.num_rows} rows and {tokens} tokens"
    return None, [Finding(name, None, f"it has {found}, its marker says {marker.rows} and {marker.tokens}")]


def _merged(file: str, faults: Iterator[Fault]) -> list[Finding]:
    """One finding for each check: its first row, and how many places there are in the shard."""
    first: dict[str, Fault] = {}
    counts: dict[str, int] = {}
    for fault in faults:
        first.setdefault(fault.check, fault)
        counts[fault.check] = counts.get(fault.check, 0) + fault.count
    return [
        Finding(
            file, fault.row, fault.what + (f" ({counts[check]} such places)" if counts[check] > 1 else "")
        )
        for check, fault in first.items()
    ]
