"""What caches there are: a row for the rollouts of each, and one for each signal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import JsonValue

from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import FolderStore
from lightopd.cache.store import Cache, open_cache
from lightopd.errors import CacheError
from lightopd.pipelines.workers.shared_shards import CLAIMS
from lightopd.schemas.manifest import CACHE_MANIFEST

DEPTH = 4
"""Folders below a given one in which caches are looked for."""
COLUMNS = (
    "cache",
    "part",
    "kind",
    "model",
    "top_k",
    "temperature",
    "rollouts",
    "tokens",
    "shards",
    "bytes",
    "state",
)


def list_caches(paths: Sequence[Path]) -> list[dict[str, JsonValue]]:
    """A row with `COLUMNS` for each part of each cache; a cache that cannot be opened says why.

    Args:
        paths: caches, or folders that have some.

    Raises:
        CacheError: a path has no cache in it.
    """
    rows: list[dict[str, JsonValue]] = []
    for path in paths:
        found = list(_caches(path, DEPTH))
        if not found:
            raise CacheError(
                f"{path} has no cache in it; name a folder made by `lightopd rollout`, or one above it"
            )
        rows += [row for cache in found for row in _rows(cache)]
    return rows


def _caches(path: Path, depth: int) -> Iterator[Path]:
    if (path / CACHE_MANIFEST).is_file():
        yield path
    elif depth and path.is_dir():
        for inner in sorted(path.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _caches(inner, depth - 1)


def _rows(path: Path) -> Iterator[dict[str, JsonValue]]:
    try:
        cache = open_cache(path, incomplete=True)
    except CacheError as error:
        nothing: dict[str, JsonValue] = dict.fromkeys(COLUMNS)
        yield {**nothing, "cache": str(path), "part": "rollouts", "state": f"damaged: {error}"}
        return
    own = cache.manifest
    yield {
        "cache": str(path),
        "part": "rollouts",
        "kind": own.origin,
        "model": own.sampler.source if own.sampler else None,
        "top_k": None,
        "temperature": own.sampling.temperature if own.sampling else None,
        **_counts(cache, None),
    }
    for name, signal in cache.signals.items():
        said = signal.manifest
        yield {
            "cache": str(path),
            "part": name,
            "kind": said.role if said.hidden is None else f"{said.role}, hidden",
            "model": said.model.source if said.model else None,
            "top_k": said.top_k,
            "temperature": 1.0,
            **_counts(cache, name),
        }


def _counts(cache: Cache, signal: str | None) -> dict[str, JsonValue]:
    markers = cache.markers if signal is None else cache.signals[signal].markers
    total = cache.manifest.num_shards
    return {
        "rollouts": sum(marker.rows for marker in markers),
        "tokens": sum(marker.tokens for marker in markers),
        "shards": f"{len(markers)}/{total}",
        "bytes": sum(marker.size_bytes for marker in markers),
        "state": _state(cache, signal, len(markers) == total),
    }


def _state(cache: Cache, signal: str | None, is_whole: bool) -> str:
    if is_whole:
        return "complete"
    kind = cache.manifest_of(signal).kind
    holder = Claims(FolderStore(cache.path / CLAIMS, kind), 1.0).other_holder()
    return f"{holder} is at work" if holder else "unfinished"
