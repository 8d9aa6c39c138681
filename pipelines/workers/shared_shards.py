"""The shards of one part of a cache, made by every process that runs the same stage on it.

Each process claims a shard, makes it and writes it; when none is left to claim it waits for those that others
make, and takes over what a process that ended left behind. So every process ends when the part is whole, and
each can report on all of it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from lightopd.cache.buckets.places import BucketPlace, place_of
from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.exclusive import exclusively, refuse_exclusive
from lightopd.cache.claims.store import ClaimStore, FolderStore
from lightopd.cache.manifests import Manifest, differences, read_manifest
from lightopd.cache.shards import ON_DISK, marker_path, put_shard, shard_path, valid_shard, write_shard
from lightopd.errors import OutputError
from lightopd.schemas.engines import SharingConfig
from lightopd.schemas.manifest import CacheManifest, ShardMarker, SignalManifest
from lightopd.under_way import doing

CLAIMS = ".lightopd.claims"
"""Folder of a cache for the claims of the processes that make it; gone when they are done."""
BEGIN = "begin"
"""Claim of what is made once, before the first shard."""
MOST_POLL_S = 1.0


@contextlib.contextmanager
def shared_shards(cache: Path, kind: str, sharing: SharingConfig) -> Iterator["SharedShards"]:
    """The shards of a part while this process works on them; its claims end with the block.

    Args:
        cache: the cache folder.
        kind: `rollouts` or `signals/<name>`.
        sharing: with whom.

    Raises:
        OutputError: sharing is switched off, here or by another process, and one of the two came first.
    """
    place = place_of(cache)
    store = FolderStore(cache / CLAIMS, kind) if place is None else place.claims(f"{CLAIMS}/{kind}")
    claims = Claims(store, sharing.lease_s)
    if sharing.exclusive and place is None:
        if (holder := claims.living_holder()) is not None:
            raise OutputError(
                f"{cache}: {holder} is writing here; wait for it or stop it, or leave out --exclusive "
                "to share its work"
            )
        store.clear()
        yield SharedShards(cache / kind, kind, store, None, sharing.lease_s)
        return
    with contextlib.ExitStack() as stack:
        at_url = None if place is None else (place.claims(CLAIMS), sharing.lease_s, place.url)
        if at_url is not None and sharing.exclusive:
            stack.enter_context(exclusively(*at_url))
        stack.enter_context(claims)
        claims.take(f"worker-{claims.holder.token[:12]}")  # for as long as its engine loads, too
        if at_url is not None and not sharing.exclusive:
            refuse_exclusive(*at_url)
        yield SharedShards(cache / kind, kind, store, claims, sharing.lease_s, place)


def alone(cache: Path, kind: str) -> "SharedShards":
    """The shards of a part for a stage that holds the whole folder, and shares with nobody."""
    return SharedShards(cache / kind, kind, FolderStore(cache / CLAIMS, kind), None, 1.0)


class SharedShards:
    """Which shard this process makes next, and how it is put in place; built by `shared_shards`."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        store: ClaimStore,
        claims: Claims | None,
        lease_s: float,
        place: BucketPlace | None = None,
    ) -> None:
        self.folder, self.kind, self._place = folder, kind, place
        self._store, self._claims = store, claims
        self._poll_s = min(MOST_POLL_S, lease_s / 10)

    @property
    def url(self) -> str | None:
        """Of the cache; None where it is a folder."""
        return None if self._place is None else self._place.url

    def refuse_other_settings(self, path: Path, manifest: Manifest) -> None:
        """Leave a part alone that living processes make under another contract, even if nothing is made yet.

        Args:
            path: of the part's manifest.
            manifest: the contract of this process.

        Raises:
            OutputError: the message names the settings that differ.
            CacheError: the manifest that is there is broken.
        """
        if self._claims is None or not path.exists():
            return
        there = read_manifest(path, type(manifest))
        if there.fingerprint() != manifest.fingerprint() and (other := self._claims.other_holder()):
            raise OutputError(
                f"{path.parent}: {other} is writing here under other settings "
                f"({'; '.join(differences(there, manifest))}); name another folder, or set these back"
            )

    def once(self, is_done: Callable[[], bool], make: Callable[[], object]) -> None:
        """Do what is done once before the first shard, or wait until another process has done it."""
        if self._claims is None:
            if not is_done():
                make()
            return
        with doing(f"{self.kind}: waiting for what another process makes once for all"):
            while not self._sees(is_done):
                if not self._claims.take(BEGIN):
                    time.sleep(self._poll_s)
                    continue
                try:
                    if not self._sees(is_done):
                        make()
                        self.send()
                finally:
                    self._claims.release(BEGIN)

    def claimed(
        self,
        missing: Sequence[int],
        fingerprint: str,
        told: Callable[[int], None],
        fits: Callable[[int], bool] = lambda _: True,
    ) -> Iterator[int]:
        """Shards for this process to make, one after another; ends when no other process makes one either.

        Args:
            missing: numbers of the shards that were not there.
            fingerprint: of the manifest that they belong to.
            told: called with each shard that another process has finished.
            fits: whether a shard that is whole is the wanted one; one that is not is made again.
        """
        if self._claims is None:
            yield from missing
            return
        damaged = {index for index in missing if marker_path(self.folder, index).exists()}
        left = dict.fromkeys(missing)
        while left:
            is_idle = True
            self._look()
            for index in tuple(left):
                is_there = index not in damaged and marker_path(self.folder, index).exists()
                if not is_there and not self._claims.take(self._key(index)):
                    continue
                if is_there or (self._is_finished(index, fingerprint) and fits(index)):
                    del left[index]
                    self._claims.release(self._key(index))
                    told(index)
                    continue
                if index in damaged and not self._claims.holds(self._key(index)):
                    self._claims.release(self._key(index))  # the look took longer than the lease
                    continue
                del left[index]
                is_idle = False
                if index in damaged:
                    self._clear(index)
                yield index
            if left and is_idle:
                with doing(f"{self.kind}: waiting for {len(left)} shards that other processes make"):
                    time.sleep(self._poll_s)

    def write(
        self,
        index: int,
        table: pa.Table,
        *,
        fingerprint: str,
        made_from: CacheManifest | SignalManifest | None = None,
    ) -> ShardMarker | None:
        """Put a shard in place and let go of its claim; None when another process has taken it over."""
        if self._claims is None:
            return write_shard(
                self.folder, index, table, kind=self.kind, fingerprint=fingerprint, made_from=made_from
            )
        try:
            if not self._claims.holds(self._key(index)):
                return None
            return put_shard(
                self.folder,
                index,
                table,
                kind=self.kind,
                fingerprint=fingerprint,
                made_from=made_from,
                place=self._place or ON_DISK,
            )
        except FileNotFoundError:  # all is finished, and what this process was writing was cleaned up
            return None
        finally:
            self._claims.release(self._key(index))

    def unfinished(self, indices: Sequence[int]) -> list[int]:
        """Those of the given shards that have no marker yet."""
        names = self._names()
        return [index for index in indices if marker_path(self.folder, index).name not in names]

    def finish(self) -> None:
        """Clean up after all processes, once the part is whole: claims, and files never finished."""
        self._names()
        self._store.clear()
        if self._place is not None:  # the folder is a mirror, which may be read from at this moment
            return
        for file in self.folder.glob(".part-*.tmp"):
            file.unlink(missing_ok=True)

    def send(self) -> None:
        """Send what was made besides shards to the URL of the cache; nothing where it is a folder."""
        if self._place is not None:
            self._place.send()

    def _sees(self, is_done: Callable[[], bool]) -> bool:
        self._look()
        return is_done()

    def _look(self) -> None:
        if self._place is not None:
            self._place.look()

    def _is_finished(self, index: int, fingerprint: str) -> bool:
        self._names()
        return valid_shard(self.folder, index, fingerprint) is not None

    def _clear(self, index: int) -> None:
        """Take away a shard that is damaged; a file without a marker is looked at when the shard is put."""
        files = marker_path(self.folder, index), shard_path(self.folder, index)
        if files[0].exists():
            for file in files:
                file.unlink(missing_ok=True) if self._place is None else self._place.remove(file)

    def _names(self) -> set[str]:
        """Names in the folder; listing it makes a network file system forget what was not there before."""
        self._look()
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    @staticmethod
    def _key(index: int) -> str:
        return shard_path(Path(), index).stem
