"""What is taken away from a cache: a signal, and what killed stages left behind.

A signal's folder leaves `signals/` by one rename; only then are its files deleted, so that a kill in between
leaves a cache without the signal, and a leftover for the same command again, or for `gc`.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightopd.cache.checks.repair import BAD
from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import FolderStore
from lightopd.cache.index import refresh_index
from lightopd.cache.manifests import orphaned_signals, signal_folder, signal_names
from lightopd.cache.store import open_cache
from lightopd.errors import CacheError, ConfigError, OutputError
from lightopd.files import flush
from lightopd.pipelines.shared.run_folder import writing
from lightopd.pipelines.workers.shared_shards import CLAIMS
from lightopd.schemas.manifest import CACHE_MANIFEST

DROPPED = ".lightopd.dropped"
"""Folder of a cache for what was taken out of it and is being deleted."""
LEASE_S = 120.0
"""For claims that do not say how long they last."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something in a cache, or beside it, that no stage needs."""

    path: Path
    size_bytes: int
    why: str


def drop_signal(cache: Path, name: str, *, is_sure: bool) -> int:
    """Delete a signal, or what is left of one whose deletion was stopped; bytes that were freed.

    Raises:
        CacheError: there is no such signal, or another one was scored over its entries.
        ConfigError: `is_sure` is not given; the message says what would be deleted.
        OutputError: another process writes in the cache.
    """
    opened = open_cache(cache, signals=(), incomplete=True)
    names = sorted({*signal_names(cache), *orphaned_signals(cache)})
    folder, aside = signal_folder(cache, name), cache / DROPPED
    begun = [path for path in aside.glob("*") if path.name.rpartition(".")[0] == name]
    if name not in names and not begun:
        there = f"name one of {', '.join(names)}" if names else "it has none, and there is nothing to drop"
        raise CacheError(f"{cache} has no signal {name!r}; {there}")
    for other in sorted({*signal_names(cache)} - {name}):
        support = open_cache(cache, signals=[other], incomplete=True).signals[other].manifest.support
        if support is not None and support.get("signal") == name:
            raise CacheError(
                f"signal {other!r} was scored over the entries of {name!r}; drop {other!r} first"
            )
    size = sum(map(_size, [folder, *begun]))
    if not is_sure:
        raise ConfigError(f"{folder} would be deleted, {size:,} bytes that were paid for; give --yes")
    with _alone(cache):
        aside.mkdir(exist_ok=True)
        if name in names:
            place = next(path for n in range(10_000) if not (path := aside / f"{name}.{n}").exists())
            folder.rename(place)
            flush(folder.parent)
        refresh_index(opened.path)
        shutil.rmtree(aside)
    return size


def leftovers(cache: Path) -> list[Leftover]:
    """What killed stages, repairs and drops left in a cache and beside it, sorted.

    Raises:
        CacheError: the folder is not a cache.
    """
    if not (cache / CACHE_MANIFEST).is_file():
        open_cache(cache)
    return [Leftover(path, _size(path), why) for path, why in sorted(_found(cache))]


def collect(cache: Path) -> list[Leftover]:
    """Delete what `leftovers` finds, and say what it was.

    Raises:
        CacheError: the folder is not a cache.
        OutputError: another process writes in the cache, or a file cannot be deleted.
    """
    leftovers(cache)
    with _alone(cache):
        found = leftovers(cache)
        for leftover in found:
            path = leftover.path
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return found


def _found(cache: Path) -> Iterator[tuple[Path, str]]:
    for folder in (
        cache,
        cache / "rollouts",
        *cache.glob("signals/*"),
        *cache.glob("texts/*"),
        cache / "heads",
    ):
        for path in folder.glob(".*.tmp*"):
            yield path, "a file that was never finished"
        for path in folder.glob("part-*.parquet"):
            if not path.with_suffix(".json").exists():
                yield path, "a shard without its marker, which its stage makes again"
    for name, why in ((DROPPED, "a signal that was dropped"), (BAD, "damaged files that were moved aside")):
        if (cache / name).exists():
            yield cache / name, why
    if (cache / CLAIMS).exists():
        yield cache / CLAIMS, "claims of processes that are gone"
    for ending in ("making.tmp", "old"):
        if (beside := cache.with_name(f".{cache.name}.{ending}")).exists():
            yield beside, "what a killed merge or split left beside the cache"


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold the cache, once no other process, of this machine or another, makes shards in it."""
    with writing(cache):
        for kind in ("rollouts", *(f"signals/{name}" for name in _claimed_signals(cache))):
            holder = Claims(FolderStore(cache / CLAIMS, kind), LEASE_S).living_holder()
            if holder is not None:
                raise OutputError(f"{cache}: {holder} is writing here; wait for it or stop it")
        yield


def _claimed_signals(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / CLAIMS / "signals").glob("*"))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
