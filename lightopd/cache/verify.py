"""Is a cache what its manifests say? Every check that needs no model; findings name file and row.

Shards are read one by one and checked in blocks of rows, so memory stays at one shard. Within a shard each
check reports its first row and how many places failed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from lightopd.cache.buckets.mirroring import folder_of
from lightopd.cache.buckets.mirrors import files_in, size_of
from lightopd.cache.checks.findings import Finding, Mending
from lightopd.cache.checks.markers import copied_shards, row_count_faults, shard_fault
from lightopd.cache.checks.order import order_faults
from lightopd.cache.checks.seals import is_changed
from lightopd.cache.checks.stale_index import index_fault
from lightopd.cache.contexts import CONTEXTS, open_text, read_contexts, read_texts, text_folder, text_names
from lightopd.cache.index import INDEX
from lightopd.cache.manifests import (
    differing,
    orphaned_signals,
    read_manifest,
    restoring,
    rollouts_folder,
    shard_numbers,
    signal_folder,
    signal_names,
)
from lightopd.cache.row_checks import Fault, rollout_faults, score_faults
from lightopd.cache.shards import AGAIN, marker_path, read_marker, read_table, shard_path
from lightopd.cache.signals.hidden_checks import hidden_faults
from lightopd.cache.signals.tail_shape import TAIL_SHAPE, read_shape
from lightopd.cache.store import open_cache, row_count_fault, streams_of
from lightopd.errors import CacheError, LineageError
from lightopd.lineage.checks import check_student, check_teacher, check_tokenizer
from lightopd.schemas.cache import ROLLOUTS, SIGNALS, signal_columns
from lightopd.schemas.manifest import (
    CACHE_MANIFEST,
    SIGNAL_MANIFEST,
    TEXT_MANIFEST,
    CacheManifest,
    SignalManifest,
)

if TYPE_CHECKING:
    from lightopd.cache.signals.rebuilt import Rebuilder


@dataclass(frozen=True, slots=True)
class _Part:
    """One folder of shards and what its files must be."""

    folder: Path
    manifest: CacheManifest | SignalManifest
    schema: pa.Schema
    copies: Mapping[int, int]
    """Shards that are copies of earlier ones, with their numbers."""

    @property
    def kind(self) -> str:
        return self.manifest.kind


def verify(path: Path) -> list[Finding]:
    """Check a whole cache: files, checksums, schemas, counts, ids, alignment, lengths, ranges, lineage.

    Returns:
        Findings, in the order of the shards; empty for a sound cache. A missing shard is a finding too.

    Raises:
        CacheError: the folder is not a cache.
    """
    path = folder_of(path)
    if streams := streams_of(path):
        return [Finding(str(path), None, stream) for stream in streams]
    if not (path / CACHE_MANIFEST).is_file():
        open_cache(path)
    try:
        manifest = read_manifest(path / CACHE_MANIFEST, CacheManifest)
    except CacheError as error:
        return [Finding(CACHE_MANIFEST, None, str(error))]
    changed = _changed_manifest(path, path / CACHE_MANIFEST, manifest)
    if changed:
        return [changed]  # what it says of the shards is not what they were made under
    signals, findings = _signal_manifests(path)
    findings += [finding for signal in signals for finding in _lineage_findings(manifest, signal)]
    changes = {
        signal.name: _changed_manifest(path, path / signal.kind / SIGNAL_MANIFEST, signal)
        for signal in signals
    }
    findings += [finding for finding in changes.values() if finding]
    signals = [signal for signal in signals if changes[signal.name] is None]
    findings += [finding for signal in signals for finding in _context_findings(path, signal)]
    findings += [finding for signal in signals for finding in _shape_findings(path, manifest, signal)]
    findings += _text_findings(path)
    findings += _stray_shards(path, manifest, signals)
    findings += _count_findings(path, manifest)
    rebuilders, own = _rebuilders(path, manifest, signals)
    findings += own
    manifests: list[CacheManifest | SignalManifest] = [manifest, *signals]
    parts = [_part(path, own) for own in manifests]
    seen: set[str] = set()
    for index in range(manifest.num_shards):
        findings += _shard_findings(path, index, parts, rebuilders, seen)
    is_readable = all(finding.mending in (Mending.NONE, Mending.STAGE) for finding in findings)
    return findings + (_index_findings(path) if is_readable else [])


def _part(path: Path, manifest: CacheManifest | SignalManifest) -> _Part:
    schema = ROLLOUTS if isinstance(manifest, CacheManifest) else signal_columns(manifest.hidden)
    folder = path / manifest.kind
    return _Part(folder, manifest, schema, copied_shards(folder))


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
        yield Finding(
            file, None, f"{what}, and no override says so; score the rollouts again under another name"
        )


def _context_findings(path: Path, signal: SignalManifest) -> Iterator[Finding]:
    folder = signal_folder(path, signal.name)
    try:
        read_contexts(folder, signal.context)
    except CacheError as error:
        file = str((folder / CONTEXTS).relative_to(path))
        yield Finding(file, None, str(error).removeprefix(f"{folder / CONTEXTS} "), Mending.ASIDE)


def _shape_findings(path: Path, manifest: CacheManifest, signal: SignalManifest) -> Iterator[Finding]:
    if signal.tail_shape is None:
        return
    folder = signal_folder(path, signal.name)
    file = folder / TAIL_SHAPE
    try:
        read_shape(folder, signal.tail_shape, manifest.vocabulary_size)
    except CacheError as error:
        what = str(error).removeprefix(str(file)).lstrip(": ")
        yield Finding(str(file.relative_to(path)), None, what, Mending.ASIDE)


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
            findings.append(Finding(file.rstrip(":"), None, what, Mending.ASIDE))
    return rebuilders, findings


def _text_findings(path: Path) -> Iterator[Finding]:
    """Shards of text columns that cannot be read beside the rollouts; of a bad manifest, one finding."""
    names = text_names(path)
    try:
        cache = open_cache(path, signals=()) if names else None
    except CacheError:  # the rollouts' own findings say why
        return
    for name in names if cache else ():
        assert cache is not None, "there are names"
        try:
            open_text(cache, name)
        except CacheError as error:
            yield Finding(str((text_folder(path, name) / TEXT_MANIFEST).relative_to(path)), None, str(error))
            continue
        for shard in cache.shards:
            file = shard_path(text_folder(path, name), shard)
            try:
                read_texts(cache, name, shard)
            except CacheError as error:
                what = str(error).removeprefix(str(file)).lstrip(": ")
                yield Finding(str(file.relative_to(path)), None, what, Mending.AFTER_ROLLOUTS)


def _changed_manifest(path: Path, file: Path, manifest: CacheManifest | SignalManifest) -> Finding | None:
    """A finding where a manifest was changed after it was written: by its checksum, or by all its markers."""
    folder = path / manifest.kind
    markers = [read_marker(folder, index) for index in shard_numbers(folder)]
    found = {marker.fingerprint for marker in markers if marker is not None}
    fingerprint, name = manifest.fingerprint(), str(file.relative_to(path))
    mended = f"copy it again, or move it away and run `lightopd verify {path} --restore`"
    if len(found) == 1 and fingerprint not in found:
        theirs, own = differing(found.pop(), fingerprint)
        what = f"it is {own}, all markers speak of {theirs}: the manifest was changed; {mended}"
        return Finding(name, None, what)
    if is_changed(file):
        what = f"the manifest was changed after it was written: its checksum does not hold; {mended}"
        return Finding(name, None, what)
    return None


def _count_findings(path: Path, manifest: CacheManifest) -> list[Finding]:
    """Too few or too many rollouts: by shard where that can be told, else over all of them."""
    folder = rollouts_folder(path)
    markers = [read_marker(folder, index) for index in range(manifest.num_shards)]
    fault = row_count_fault(manifest, [marker for marker in markers if marker is not None])
    if fault is None or None in markers:
        return []
    by_shard = [
        Finding(str(shard_path(folder, index).relative_to(path)), None, f"{what}; {AGAIN}", Mending.ASIDE)
        for index, what in row_count_faults(folder, manifest)
    ]
    return by_shard or [Finding(CACHE_MANIFEST, None, fault)]


def _index_findings(path: Path) -> list[Finding]:
    """Whether the index is stale; a cache that cannot be opened has findings of its own."""
    try:
        fault = index_fault(open_cache(path, incomplete=True))
    except (CacheError, duckdb.Error, UnicodeDecodeError):
        return []
    return [Finding(INDEX, None, fault, Mending.INDEX)] if fault else []


def _stray_shards(path: Path, manifest: CacheManifest, signals: list[SignalManifest]) -> Iterator[Finding]:
    folders = [rollouts_folder(path), *(signal_folder(path, signal.name) for signal in signals)]
    for folder in folders:
        indices = range(manifest.num_shards)
        known = {made(folder, index) for made in (shard_path, marker_path) for index in indices}
        there = {*files_in(folder, "part-*"), *files_in(folder, "*.parquet")} - {folder / CONTEXTS}
        for file in sorted(there - known):
            what = f"it is not one of the cache's {manifest.num_shards} shards; delete it"
            yield Finding(str(file.relative_to(path)), None, what, Mending.ASIDE)


def _shard_findings(
    path: Path,
    index: int,
    parts: Sequence[_Part],
    rebuilders: "Mapping[str, Rebuilder]",
    seen: set[str],
) -> list[Finding]:
    """Everything about one shard of rollouts and of each signal; `seen` gathers the rollout ids."""
    part, *others = parts
    manifest = part.manifest
    assert isinstance(manifest, CacheManifest), "the first part"
    rollouts, findings = _load(path, part, index)
    file = str(shard_path(part.folder, index).relative_to(path))
    if rollouts is not None:
        faults = list(rollout_faults(rollouts, manifest, seen))
        marker = read_marker(part.folder, index)
        if not faults and marker is not None:
            faults = list(order_faults(rollouts, manifest, marker))
        findings += _merged(file, faults, Mending.ASIDE)
    for part in others:
        signal = part.manifest
        assert isinstance(signal, SignalManifest), "all but the first"
        scores, own = _load(path, part, index)
        findings += own
        if scores is not None and rollouts is not None:
            file = str(shard_path(part.folder, index).relative_to(path))
            faults = list(
                score_faults(scores.select(SIGNALS.names), rollouts, signal, manifest.vocabulary_size)
            )
            faults += _state_faults(scores, rollouts, signal, rebuilders.get(signal.name))
            findings += _merged(file, faults, Mending.AFTER_ROLLOUTS)
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
    file, marker = shard_path(part.folder, index), read_marker(part.folder, index)
    name = str(file.relative_to(path))
    if size_of(file) is None and not marker_path(part.folder, index).exists():
        what = "the shard is missing; run the stage that makes it again"
        return None, [Finding(name, None, what, Mending.STAGE)]
    reason = shard_fault(part.folder, index, part.manifest)
    if reason is None and index in part.copies:
        reason = f"it is a copy of shard {part.copies[index]}"
    if reason:
        what = f"{reason}; copy it again, or delete its marker and make it again"
        return None, [Finding(name, None, what, Mending.ASIDE)]
    assert marker is not None, "without one it is not valid"
    try:
        table = read_table(file, part.kind, marker, part.schema.names)
    except CacheError as error:
        what = str(error).removeprefix(f"{file} ").removesuffix(f"; {AGAIN}")
        return None, [Finding(name, None, what, Mending.ASIDE)]
    column = "response_ids" if part.kind == "rollouts" else "logprobs"
    tokens = sum(len(chunk.flatten()) for chunk in table.column(column).chunks)
    if (table.num_rows, tokens) == (marker.rows, marker.tokens):
        return table, []
    found = f"{table.num_rows} rows and {tokens} tokens"
    what = f"it has {found}, its marker says {marker.rows} and {marker.tokens}"
    return None, [Finding(name, None, what, Mending.ASIDE)]


def _merged(file: str, faults: Sequence[Fault], mending: Mending) -> list[Finding]:
    """One finding for each check: its first row, and how many places there are in the shard."""
    first: dict[str, Fault] = {}
    counts: dict[str, int] = {}
    for fault in faults:
        first.setdefault(fault.check, fault)
        counts[fault.check] = counts.get(fault.check, 0) + fault.count
    return [
        Finding(
            file,
            fault.row,
            fault.what + (f" ({counts[check]} such places)" if counts[check] > 1 else ""),
            mending,
        )
        for check, fault in first.items()
    ]
