"""How much of the caches at URLs is kept on this machine: the shards that were of use last."""

import os
import time
from pathlib import Path, PurePath

from lightopd.errors import ConfigError

HEADS = "heads"
"""Folder of a cache with the heads of its signals' hidden states, named by their SHA-256."""
LIMIT = "LIGHTOPD_SHARD_CACHE_BYTES"
"""Environment variable: most bytes that the shards of all mirrors take."""
DEFAULT_BYTES = 50 * 10**9
ABANDONED_S = 24 * 3600
"""Age at which a file that is still on its way is one that a killed process left."""


def is_shard(path: PurePath) -> bool:
    """Whether a name in a cache is of what comes when it is read: a shard, or the head of hidden states."""
    return (path.name.startswith("part-") and path.suffix == ".parquet") or path.parent.name == HEADS


def limit_bytes() -> int:
    """Most bytes of all shards that are kept.

    Raises:
        ConfigError: the environment says no number.
    """
    text = os.environ.get(LIMIT, str(DEFAULT_BYTES))
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{LIMIT}={text} is no number of bytes; write it as 50000000000") from None


def make_room(mirrors: Path, coming_bytes: int) -> None:
    """Remove the shards that were used least recently, until one that comes fits within the limit.

    One that is larger than the limit comes all the same, alone. Whoever has a removed file open reads on.
    """
    kept = []
    for folder, _, names in os.walk(mirrors):
        for name in names:
            path = Path(folder) / name
            is_coming = name.startswith(".") and name.endswith(".tmp")
            if not is_coming and not is_shard(path):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if is_coming and time.time() - status.st_ctime > ABANDONED_S:
                path.unlink(missing_ok=True)
            elif not is_coming:
                kept.append((status.st_atime_ns, status.st_size, path))
    over = sum(size_bytes for _, size_bytes, _ in kept) + coming_bytes - limit_bytes()
    for _, size_bytes, path in sorted(kept):
        if over <= 0:
            break
        path.unlink(missing_ok=True)
        over -= size_bytes
