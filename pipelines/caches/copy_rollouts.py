"""Rollouts of one cache copied into another, byte for byte and checked."""

from pathlib import Path

from lightopd.cache.buckets.mirrors import when_here
from lightopd.cache.manifests import rollouts_folder
from lightopd.cache.shards import marker_path, shard_path, valid_shard
from lightopd.cache.store import Cache, create_cache, open_cache
from lightopd.errors import CacheError
from lightopd.files import write_atomically


def copy_rollouts(source: Cache, path: Path) -> Cache:
    """Copy the rollout shards of `source` that `path` lacks; the cache at `path`, without signals.

    Raises:
        CacheError: a shard of the source does not match its SHA-256.
        OutputError: `path` holds another cache.
    """
    create_cache(path, source.manifest)
    fingerprint = source.manifest.fingerprint()
    old, new = rollouts_folder(source.path), rollouts_folder(path)
    new.mkdir(parents=True, exist_ok=True)
    for shard in source.shards:
        if valid_shard(new, shard, fingerprint) is not None:
            continue
        marker = valid_shard(old, shard, fingerprint)
        if marker is None:
            raise CacheError(f"{shard_path(old, shard)} does not match its checksum; copy or make it again")
        file = shard_path(old, shard)
        write_atomically(shard_path(new, shard), when_here(file, marker.sha256, file.read_bytes))
        write_atomically(marker_path(new, shard), marker_path(old, shard).read_bytes())
        if valid_shard(new, shard, fingerprint) is None:
            raise CacheError(
                f"{shard_path(new, shard)} does not match its checksum after the copy; copy again"
            )
    return open_cache(path, signals=())
