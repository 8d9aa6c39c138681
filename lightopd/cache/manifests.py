"""Manifests of a cache: read, compared, and made again from the markers of their shards.

A marker holds the manifest that its shard was made under, so that one that is lost costs nothing that was
paid for. The engine's noise is measured when scoring begins and stands in the manifest alone: one made again
lacks it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from lightopd.cache.buckets.shard_cache import HEADS
from lightopd.cache.checks.seals import sealed, unsealed
from lightopd.cache.shards import read_marker
from lightopd.errors import CacheError
from lightopd.files import write_atomically
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.lineage.hashing import compared_fields
from lightopd.schemas.manifest import (
    CACHE_MANIFEST,
    SIGNAL_MANIFEST,
    TEXT_MANIFEST,
    CacheManifest,
    ModelFingerprint,
    SignalManifest,
    TextManifest,
)

PULLING = ".lightopd.pull"
"""File in a cache folder that `lightopd pull` has not finished; it holds the URL."""

COPY_AGAIN = "copy the signal's folder again from where it was made, or score the signal again"

Manifest = TypeVar("Manifest", CacheManifest, SignalManifest, TextManifest)


def head_path(cache: Path, sha256: str) -> Path:
    """File of a head in a cache folder."""
    return cache / HEADS / f"{sha256}.safetensors"


def rollouts_folder(path: Path) -> Path:
    """Folder of the rollout shards of a cache."""
    return path / "rollouts"


def signal_folder(path: Path, name: str) -> Path:
    """Folder of a signal's manifest and shards."""
    return path / "signals" / name


def signal_names(path: Path) -> tuple[str, ...]:
    """Names of the signals in a cache folder, sorted."""
    return tuple(sorted(file.parent.name for file in (path / "signals").glob(f"*/{SIGNAL_MANIFEST}")))


def orphaned_signals(path: Path) -> tuple[str, ...]:
    """Names of folders with shards of a signal and no manifest, sorted."""
    found = {file.parent.name for file in (path / "signals").glob("*/part-*")}
    return tuple(sorted(found - set(signal_names(path))))


def read_manifest(path: Path, kind: type[Manifest]) -> Manifest:
    """Read a manifest file.

    Raises:
        CacheError: the file is missing, is not JSON, does not fit, or has a newer schema version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CacheError(f"{path} is missing; copy the whole cache folder, or make it again") from None
    return parsed_manifest(content, str(path), kind)


def parsed_manifest(content: bytes, where: str, kind: type[Manifest]) -> Manifest:
    """A manifest from its bytes, which were read at `where`.

    Raises:
        CacheError: they are not JSON, do not fit, or have a newer schema version.
    """
    try:
        plain = json.loads(content)
    except ValueError as error:
        raise CacheError(
            f"{where} is not valid JSON ({error}); copy the file again from where it was made"
        ) from None
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CacheError(
            f"{where} has schema version {version}, this lightopd reads up to {SCHEMA_VERSION}; upgrade it"
        )
    try:
        return kind.model_validate_json(json.dumps(unsealed(plain)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise CacheError(
            f"{where} does not fit: {field}: {first['msg']}; copy or make the cache again"
        ) from None


def read_named(path: Path, sha256: str, what: str) -> bytes:
    """A small file beside a signal's shards, the very one that the signal's manifest names.

    Raises:
        CacheError: it cannot be read, or is another; `what` says in a word what it holds.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror}); {COPY_AGAIN}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CacheError(f"{path} is not the {what} that {SIGNAL_MANIFEST} names; {COPY_AGAIN}")
    return content


def schema_version_at(path: Path) -> int:
    """Schema version of the manifest at `path`, which a stage that resumes keeps; the newest where none is.

    Raises:
        CacheError: the manifest is broken.
    """
    if not path.exists():
        return SCHEMA_VERSION
    if path.name == SIGNAL_MANIFEST:
        return read_manifest(path, SignalManifest).schema_version
    if path.name == TEXT_MANIFEST:
        return read_manifest(path, TextManifest).schema_version
    return read_manifest(path, CacheManifest).schema_version


def as_begun(manifest: Manifest, path: Path) -> Manifest:
    """A contract with its models under the hashes by which the manifest at `path` knows them.

    What was begun under an earlier spelling of configs is resumed under it, with the same rollout ids.

    Raises:
        CacheError: the manifest is broken.
    """
    if not path.exists():
        return manifest
    known: Manifest = _spelled_as(manifest, read_manifest(path, type(manifest)))
    return known


def _spelled_as(now: Any, begun: Any) -> Any:
    if isinstance(now, ModelFingerprint):
        return now.spelled_as(begun if isinstance(begun, ModelFingerprint) else None)
    if not isinstance(now, BaseModel) or type(now) is not type(begun):
        return now
    names = type(now).model_fields
    return now.model_copy(
        update={name: _spelled_as(getattr(now, name), getattr(begun, name)) for name in names}
    )


def differences(found: Manifest, wanted: Manifest) -> list[str]:
    """Fields that make two manifests' fingerprints differ, as `field: is A, would be B`."""
    pairs = differing_fields(found, wanted).items()
    return [f"{field}: is {before!r}, would be {after!r}" for field, (before, after) in pairs]


def differing_fields(one: Manifest, other: Manifest) -> dict[str, tuple[Any, Any]]:
    """Both values of every field that makes two manifests' fingerprints differ, by its dotted name."""
    before, after = _flat(compared_fields(one)), _flat(compared_fields(other))
    return {
        field: (before.get(field), after.get(field))
        for field in sorted(before.keys() | after.keys())
        if before.get(field) != after.get(field)
    }


def differing(one: str, other: str) -> tuple[str, str]:
    """The beginnings of two hashes, as long as it takes to tell them apart."""
    length = next((n for n in range(12, len(one)) if one[:n] != other[:n]), len(one))
    return one[:length], other[:length]


def restoring(cache: Path, name: str) -> str:
    """How the manifest of a signal that is gone comes back, without scoring anything again."""
    folder = signal_folder(cache, name)
    if _made_from(folder):
        return f"make it again from its shards: lightopd verify {cache} --restore"
    return (
        f"copy {SIGNAL_MANIFEST} again, or make it again from the settings it was scored with: "
        f"lightopd precompute -c {folder / 'precompute.yaml'}"
    )


def made_again(cache: Path) -> str:
    """What to do about a folder without the manifest of a cache."""
    if (cache / PULLING).is_file():
        url = (cache / PULLING).read_text(encoding="utf-8").strip()
        return f"it is half pulled; run `lightopd pull {url} {cache}` again, it resumes"
    if _made_from(rollouts_folder(cache)):
        return f"it has rollouts, which say how they were made: lightopd verify {cache} --restore"
    return "name a folder made by `lightopd rollout`"


def restore_manifests(cache: Path) -> list[Path]:
    """Write the manifests that are gone again, of the rollouts and of every signal; those that were written.

    Raises:
        CacheError: markers of one folder speak of several manifests, or of none: they are older than this.
    """
    written = []
    if not (cache / CACHE_MANIFEST).exists() and any(rollouts_folder(cache).glob("part-*.json")):
        written.append(_restore(cache / CACHE_MANIFEST, rollouts_folder(cache), CacheManifest))
    for name in orphaned_signals(cache):
        folder = signal_folder(cache, name)
        written.append(_restore(folder / SIGNAL_MANIFEST, folder, SignalManifest))
    return written


def _restore(path: Path, folder: Path, kind: type[Manifest]) -> Path:
    found = _made_from(folder)
    if len({json.dumps(each, sort_keys=True) for each in found}) != 1:
        what = "of several manifests" if found else "of no manifest, as those of older versions do"
        raise CacheError(
            f"the markers in {folder} speak {what}; copy {path.name} again from where it was made"
        )
    try:
        manifest = kind.model_validate(found[0])
    except ValidationError as error:
        raise CacheError(f"the markers in {folder} hold a broken manifest; copy {path.name} again") from error
    markers = [read_marker(folder, index) for index in shard_numbers(folder)]
    others = [marker for marker in markers if marker and marker.fingerprint != manifest.fingerprint()]
    if others or (isinstance(manifest, SignalManifest) and manifest.name != folder.name):
        raise CacheError(
            f"the markers in {folder} hold a manifest of other shards; copy {path.name} again from where it "
            "was made"
        )
    write_atomically(path, sealed(manifest.model_dump(mode="json")))
    return path


def _made_from(folder: Path) -> list[dict[str, JsonValue]]:
    """The manifests that the markers of a folder hold."""
    markers = [read_marker(folder, index) for index in shard_numbers(folder)]
    return [marker.made_from for marker in markers if marker is not None and marker.made_from is not None]


def shard_numbers(folder: Path) -> list[int]:
    """Numbers of the shards that have a marker in a folder, sorted."""
    names = (path.stem.removeprefix("part-") for path in sorted(folder.glob("part-*.json")))
    return [int(name) for name in names if name.isdecimal()]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {} if value else {prefix: {}}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else key))
    return flat
