"""What a cache adds to the memory of a device, from its manifests."""

from dataclasses import dataclass

from lightopd.cache.store import Cache
from lightopd.objectives.base.part import Needs


@dataclass(frozen=True, slots=True)
class CachedSizes:
    """Of what an objective reads of a cache."""

    entries: int = 0
    """Entries of a position, over all signals whose support is read."""
    hidden: int = 0
    """Numbers in the hidden states of a position, over all signals that give theirs."""
    heads: int = 0
    """Bytes of the heads that read them, in float32."""


NOTHING = CachedSizes()


def cached_sizes(cache: Cache, needed: Needs) -> CachedSizes:
    """Sizes of what the objective reads; `needed` is what it needs of this cache."""
    kept = [cache.signals[name].manifest.hidden for name in needed.hidden]
    sizes = {each.head: each.size for each in kept if each is not None}
    return CachedSizes(
        entries=sum(cache.signals[name].manifest.top_k for name in needed.topk)
        + sum(entries.top_k for _, entries in needed.entries),
        hidden=sum(each.size for each in kept if each is not None),
        heads=4 * cache.manifest.vocabulary_size * sum(sizes.values()),
    )
