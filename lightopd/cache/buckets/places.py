"""A cache that several machines make at a URL: shards and markers put there, each in a mirror here as well.

A shard is an object before its marker is, both put only where none is, so that one that is finished is never
touched. What a stage has besides its shards is sent when it was made, manifests only where none is.
"""

from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lightopd.cache.buckets.layout import RECORD, ROLLOUTS
from lightopd.cache.buckets.mirroring import (
    MANIFESTS,
    Objects,
    bring_up_to_date,
    is_small_here,
    mirror_folder,
)
from lightopd.cache.buckets.mirrors import keep, mirror_of
from lightopd.cache.buckets.stores.bucket import Bucket
from lightopd.cache.claims.store import BucketStore
from lightopd.errors import OutputError
from lightopd.files import looks_like_url, write_atomically
from lightopd.schemas.configs import PrecomputeConfig, RolloutConfig
from lightopd.schemas.manifest import CACHE_MANIFEST


class BucketPlace:
    """What stands for a URL that a stage writes to.

    Args:
        url: of the cache, which need not be there yet.

    Raises:
        ConfigError: no store takes the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder = mirror_folder(url)
        self._bucket = Bucket(url, is_made=True)

    def claims(self, folder: str) -> BucketStore:
        """Claims below a folder of the cache."""
        return BucketStore(self._bucket, folder)

    def look(self) -> Objects:
        """See in the mirror what is at the URL now, but for its shards; the objects that are there."""
        return bring_up_to_date(self._bucket, self.folder)

    def send(self) -> None:
        """Send what a stage made besides shards; what other processes sent meanwhile is seen as well."""
        self.look()
        mirror = mirror_of(self.folder)
        there = {} if mirror is None else mirror.sizes
        for path in sorted(self.folder.rglob("*"), key=lambda path: path.name in MANIFESTS):
            name = self._name(path)
            if not path.is_file() or not is_small_here(name):
                continue
            content = path.read_bytes()
            if there.get(name) == len(content) and self._bucket.read(name) == content:
                continue
            if path.name in MANIFESTS:
                self._bucket.put_if_absent(name, content)
            else:
                self._bucket.put(name, content)
        self.look()

    def put_if_absent(self, path: Path, content: Any) -> bool:
        """Put an object in place, unless one of its name is there; whether the content is there now."""
        whole = bytes(content)
        is_put = self._bucket.put_if_absent(self._name(path), whole)
        if is_put:
            self._keep(path, whole)
        return is_put

    def read(self, path: Path) -> bytes:
        """Content of an object.

        Raises:
            FileNotFoundError: someone removed it.
        """
        content = self._bucket.read(self._name(path))
        if content is None:
            raise FileNotFoundError(f"{self.url}/{self._name(path)}")
        return content

    def replace(self, path: Path, content: Any) -> None:
        """Put an object in place, whatever is there."""
        self._bucket.put(self._name(path), bytes(content))
        self._keep(path, bytes(content))

    def remove(self, path: Path) -> None:
        """Take an object away, and its copy."""
        self._bucket.delete(self._name(path))
        path.unlink(missing_ok=True)

    def _keep(self, path: Path, content: bytes) -> None:
        if path.suffix == ".parquet":
            keep(path, content)
        else:
            write_atomically(path, content, shared=True)

    def _name(self, path: Path) -> str:
        return PurePosixPath(path.relative_to(self.folder)).as_posix()


Config = TypeVar("Config", RolloutConfig, PrecomputeConfig)


def at_its_place(config: Config) -> tuple[Config, str]:
    """A stage's config with the mirror for a cache at a URL, brought up to date, and the cache's name.

    Raises:
        ConfigError: no store takes the URL.
        InputError: the store cannot be read.
        OutputError: a cache was pushed there, and not to its end.
    """
    place = place_of(config.cache)
    if place is None:
        return config, str(config.cache)
    there = place.look()
    brings_rollouts = isinstance(config, PrecomputeConfig) and config.rollouts is not None
    if CACHE_MANIFEST not in there and f"{ROLLOUTS}/{RECORD}" in there and not brings_rollouts:
        raise OutputError(f"{place.url} is half pushed; run that `lightopd push` again, or name another")
    return config.model_copy(update={"cache": place.folder}), place.url


def place_of(path: Path) -> BucketPlace | None:
    """The place that a stage writes to, where its cache is at a URL, or in the mirror of one."""
    url = looks_like_url(path)
    if url is None and (mirror := mirror_of(path.resolve())) is not None:
        url = mirror.url
    return None if url is None else BucketPlace(url)
