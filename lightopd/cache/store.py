"""A cache as a folder: made, opened, checked for completeness, and named by its content.

    lightopd.json   rollouts/part-NNNNN.parquet + .json   signals/<name>/signal.json + parts

Opening reads manifests, markers and file sizes. The bytes are checked where they are read (page checksums),
by the trainer before its first step and by `lightopd verify` (SHA-256).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightopd.cache.buckets.mirroring import folder_of
from lightopd.cache.buckets.mirrors import mirror_of, size_of
from lightopd.cache.checks.seals import sealed
from lightopd.cache.manifests import (
    Manifest,
    differences,
    differing,
    made_again,
    orphaned_signals,
    read_manifest,
    restoring,
    rollouts_folder,
    signal_folder,
    signal_names,
)
from lightopd.cache.shards import marker_path, read_marker, shard_path
from lightopd.errors import CacheError, OutputError
from lightopd.files import streams_in, write_atomically
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import Horizon
from lightopd.schemas.manifest import (
    CACHE_MANIFEST,
    SIGNAL_MANIFEST,
    CacheManifest,
    ShardMarker,
    SignalManifest,
)

STAGES = {"student": "rollout", "teacher": "sft", "imported": "import", "mixed": "join"}
"""Command that makes the rollouts of a cache, by origin."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One model's scores over the rollouts."""

    manifest: SignalManifest
    shards: tuple[int, ...]
    """Numbers of the shards that are there; all of them unless the cache was opened incomplete."""
    markers: tuple[ShardMarker, ...]
    """Their markers, in the same order."""


@dataclass(frozen=True, slots=True)
class Cache:
    """An opened cache."""

    path: Path
    manifest: CacheManifest
    shards: tuple[int, ...]
    """Numbers of the rollout shards that are there; all of them unless opened incomplete."""
    markers: tuple[ShardMarker, ...]
    """Their markers, in the same order; in a complete cache, marker i is of shard i."""
    signals: dict[str, Signal]

    @property
    def num_rollouts(self) -> int:
        """Rows over all shards that are there."""
        return sum(marker.rows for marker in self.markers)

    @property
    def num_tokens(self) -> int:
        """Response tokens over all shards that are there."""
        return sum(marker.tokens for marker in self.markers)

    def manifest_of(self, signal: str | None) -> CacheManifest | SignalManifest:
        """Manifest of a signal, or of the rollouts.

        Raises:
            CacheError: the cache was opened without such a signal.
        """
        if signal is None:
            return self.manifest
        if signal not in self.signals:
            there = ", ".join(self.signals) or "none"
            raise CacheError(f"{self.path} has no signal {signal!r} loaded (loaded: {there})")
        return self.signals[signal].manifest

    def file(self, shard: int, signal: str | None = None) -> Path:
        """Parquet file of a shard, of the rollouts or of a signal."""
        return shard_path(self.path / self.manifest_of(signal).kind, shard)

    def marker(self, shard: int, signal: str | None = None) -> ShardMarker:
        """Marker of a shard, of the rollouts or of a signal.

        Raises:
            CacheError: the shard is not there.
        """
        part = self if signal is None else self.signals[signal]
        if shard not in part.shards:
            raise CacheError(f"{self.file(shard, signal)} is missing; run the stage that makes it again")
        return part.markers[part.shards.index(shard)]

    def missing(self, signal: str | None = None) -> tuple[int, ...]:
        """Numbers of the shards that are not there yet, of the rollouts or of a signal."""
        present = self.shards if signal is None else self.signals[signal].shards
        return tuple(sorted(set(range(self.manifest.num_shards)) - set(present)))


def create_cache(path: Path, manifest: CacheManifest) -> None:
    """Make a cache folder with its manifest, or find it there made under the same settings.

    Raises:
        OutputError: the folder holds a cache made under other settings (the message names them), or shards
            without a manifest; or it cannot be written.
        CacheError: the manifest that lies there is broken or of a newer schema version.
    """
    create_part(path / CACHE_MANIFEST, manifest, [rollouts_folder(path), path / "signals"])


def create_signal(cache: Cache, manifest: SignalManifest) -> None:
    """Make the folder of a signal in a cache, or find it there made under the same settings.

    Raises:
        OutputError: a signal of this name was made under other settings, or it cannot be written.
        CacheError: the signal speaks of other rollouts than the cache's, or its manifest is broken.
    """
    _check_belongs(cache.path, cache.manifest, manifest)
    _refuse_orphans(cache, manifest)
    create_part(signal_folder(cache.path, manifest.name) / SIGNAL_MANIFEST, manifest, [])


def _refuse_orphans(cache: Cache, manifest: SignalManifest) -> None:
    """Shards without their manifest get it back where it is the very one they were made under."""
    folder = signal_folder(cache.path, manifest.name)
    if (folder / SIGNAL_MANIFEST).exists():
        return
    for index in range(cache.manifest.num_shards):
        marker = read_marker(folder, index)
        if marker is not None and marker.fingerprint != manifest.fingerprint():
            raise OutputError(
                f"{folder} has shards made under other settings, and no {SIGNAL_MANIFEST}; "
                f"{restoring(cache.path, manifest.name)}, or name another signal"
            )


def open_cache(path: Path, *, signals: Sequence[str] | None = None, incomplete: bool = False) -> Cache:
    """Read a cache's manifests and markers, and refuse what is not whole.

    Args:
        path: the cache folder, or the URL of a cache, which is read where it lies.
        signals: names to load; None loads every signal in the folder.
        incomplete: accept missing shards, as a stage that is about to make them does.

    Raises:
        CacheError: not a cache, newer schema version, broken JSON, a signal that is not there, a shard that
            is missing, has another size than its marker says or was made under other settings.
    """
    path = folder_of(path)
    if streams := streams_of(path):
        raise CacheError(streams[0])
    if not (path / CACHE_MANIFEST).is_file():
        raise CacheError(f"{path} is not a cache: it has no {CACHE_MANIFEST}; {made_again(path)}")
    manifest = read_manifest(path / CACHE_MANIFEST, CacheManifest)
    shards, markers = _present(rollouts_folder(path), manifest.num_shards, manifest.fingerprint())
    names = signal_names(path) if signals is None else tuple(signals)
    loaded = {name: _open_signal(path, manifest, name) for name in names}
    cache = Cache(path, manifest, shards, markers, loaded)
    if not incomplete:
        _check_complete(cache)
    _check_aligned(cache)
    return cache


def streams_of(path: Path) -> list[str]:
    """FIFOs, sockets and devices in a cache folder, in words: reading one may never end."""
    return streams_in(path, rollouts_folder(path), *sorted(path.glob("signals/*")))


def content_id(cache: Cache, signals: Sequence[str]) -> str:
    """Hash of what a run reads: rollouts and the named signals, settings and bytes; paths do not matter."""
    content: dict[str, Any] = {
        "rollouts": [cache.manifest.fingerprint(), *(marker.sha256 for marker in cache.markers)]
    }
    for name in signals:
        signal = cache.signals[name]
        content[f"signals/{name}"] = [
            signal.manifest.fingerprint(),
            *(marker.sha256 for marker in signal.markers),
        ]
    return canonical_hash(content)


def create_part(path: Path, manifest: Manifest, others: Sequence[Path] = ()) -> None:
    """Write a manifest, or find it there made under the same settings."""
    if not path.exists():
        found = [folder.name for folder in others if folder.exists() and any(folder.iterdir())]
        if found:
            raise OutputError(
                f"{path.parent} has {found[0]}/ but no {path.name}; name another folder, or empty it"
            )
        write_atomically(path, sealed(manifest.model_dump(mode="json")))
        return
    existing = read_manifest(path, type(manifest))
    if existing.fingerprint() == manifest.fingerprint():
        return
    is_begun = mirror_of(path) is not None or any(path.parent.rglob("part-*.parquet"))
    if not is_begun:  # a start that failed: nothing in it is paid for
        write_atomically(path, sealed(manifest.model_dump(mode="json")))
    else:
        raise OutputError(
            f"{path.parent} belongs to another run ({'; '.join(differences(existing, manifest))}); "
            "name another place, or set these back"
        )


def _open_signal(path: Path, manifest: CacheManifest, name: str) -> Signal:
    folder = signal_folder(path, name)
    if name in orphaned_signals(path):
        raise CacheError(f"{folder} has shards but no {SIGNAL_MANIFEST}; {restoring(path, name)}")
    if not (folder / SIGNAL_MANIFEST).is_file():
        there = ", ".join(signal_names(path)) or "none"
        raise CacheError(
            f"{path} has no signal {name!r} (there: {there}); make it with `lightopd precompute`"
        )
    signal = read_manifest(folder / SIGNAL_MANIFEST, SignalManifest)
    _check_belongs(path, manifest, signal)
    return Signal(signal, *_present(folder, manifest.num_shards, signal.fingerprint()))


def _check_belongs(path: Path, manifest: CacheManifest, signal: SignalManifest) -> None:
    if signal.rollouts != manifest.fingerprint():
        raise CacheError(
            f"signal {signal.name!r} scored the rollouts {signal.rollouts[:12]}, {path} holds "
            f"{manifest.fingerprint()[:12]}; score these rollouts with `lightopd precompute`"
        )


def _present(
    folder: Path, num_shards: int, fingerprint: str
) -> tuple[tuple[int, ...], tuple[ShardMarker, ...]]:
    """Shards that have a marker; a marker that is broken or speaks of another file or run is an error."""
    present = [index for index in range(num_shards) if marker_path(folder, index).exists()]
    found = [marker.fingerprint for index in present if (marker := read_marker(folder, index)) is not None]
    if len(set(found)) == 1 and found[0] != fingerprint:
        theirs, own = differing(found[0], fingerprint)
        raise CacheError(
            f"{folder}: all its markers speak of settings {theirs}, its manifest is {own}; the manifest was "
            "changed after the shards were made: copy it again from where it was made"
        )
    return tuple(present), tuple(_checked_marker(folder, index, fingerprint) for index in present)


def _checked_marker(folder: Path, index: int, fingerprint: str) -> ShardMarker:
    marker, file = read_marker(folder, index), shard_path(folder, index)
    again = f"delete {marker_path(folder, index).name} and run the stage that made it again, or copy it again"
    if marker is None:
        raise CacheError(f"{marker_path(folder, index)} is not a valid marker; {again}")
    if marker.fingerprint != fingerprint:
        raise CacheError(f"{file} was made under other settings than its manifest says; {again}")
    size_bytes = size_of(file)
    if size_bytes is None:
        raise CacheError(f"{file} is missing but has a marker; {again}")
    if size_bytes != marker.size_bytes:
        raise CacheError(f"{file} has {size_bytes} bytes, its marker says {marker.size_bytes}; {again}")
    return marker


def row_count_fault(manifest: CacheManifest, markers: Sequence[ShardMarker]) -> str | None:
    """What is wrong with the number of rows of all shards together, in words."""
    if manifest.made_of:
        wanted, found = (
            sum(each)
            for each in (
                (source.rollouts for source in manifest.made_of),
                (marker.rows for marker in markers),
            )
        )
        return None if found == wanted else f"{found} rollouts are there, its manifest speaks of {wanted}"
    if manifest.sampling is None or manifest.joined:
        return None
    found = sum(marker.rows + sum(marker.dropped.values()) for marker in markers)
    wanted = manifest.num_prompts * manifest.sampling.n
    if found == wanted:
        return None
    each = f"{manifest.num_prompts} prompts with {manifest.sampling.n} each"
    return f"{found} rollouts are there, {each} make {wanted}"


def _check_complete(cache: Cache) -> None:
    stage = STAGES[cache.manifest.origin]
    _refuse_missing(cache, rollouts_folder(cache.path), cache.missing(), f"lightopd {stage}")
    fault = row_count_fault(cache.manifest, cache.markers)
    if fault:
        raise CacheError(f"{cache.path}: {fault}; copy the cache again, or make it again")
    for name in cache.signals:
        command = f"lightopd precompute --cache {cache.path} --signal {name}"
        _refuse_missing(cache, signal_folder(cache.path, name), cache.missing(name), command)


def _refuse_missing(cache: Cache, folder: Path, missing: tuple[int, ...], command: str) -> None:
    if missing:
        names = ", ".join(shard_path(folder, index).name for index in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CacheError(
            f"{folder} is incomplete: {len(missing)} of {cache.manifest.num_shards} shards are missing "
            f"({names}{more}); run the same `{command}` again, it resumes where it stopped"
        )


def _check_aligned(cache: Cache) -> None:
    rows = dict(zip(cache.shards, cache.markers, strict=True))
    for name, signal in cache.signals.items():
        for index, marker in zip(signal.shards, signal.markers, strict=True):
            own = rows.get(index)
            if own is not None and not _speaks_of(marker, own, signal.manifest.horizon):
                raise CacheError(
                    f"{shard_path(signal_folder(cache.path, name), index)} has {marker.rows} rows and "
                    f"{marker.tokens} tokens, its rollouts have {own.rows} and {own.tokens}; score them again"
                )


def _speaks_of(signal: ShardMarker, rollouts: ShardMarker, horizon: Horizon | None) -> bool:
    """Whether a signal's shard is as large as its rollouts'; with a horizon, no larger."""
    if horizon is None:
        return (signal.rows, signal.tokens) == (rollouts.rows, rollouts.tokens)
    return signal.rows == rollouts.rows and signal.tokens <= rollouts.tokens
