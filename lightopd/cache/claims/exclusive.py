"""A cache at a URL for one process alone, where no lock of a file system keeps others away.

Whoever wants it alone claims it first and then looks for others; whoever shares says that it is there first
and then looks for such a claim. So of two that come at the same moment at least one sees the other. What the
claims of shards protect does not hang on it.
"""

import contextlib
from collections.abc import Iterator

from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import BucketStore, ClaimStore
from lightopd.errors import OutputError

EXCLUSIVE = "exclusive"
"""Key of the claim, beside the folders of the parts' claims."""


@contextlib.contextmanager
def exclusively(store: BucketStore, lease_s: float, where: str) -> Iterator[None]:
    """Keep all others away from a cache while the block runs.

    Takes as long as a lease where claims of another machine lie there.

    Args:
        store: the claims of all parts of the cache.
        lease_s: of this process's claim.
        where: name of the cache.

    Raises:
        OutputError: another process is writing there.
    """
    with Claims(store, lease_s) as guard:
        is_taken = guard.take(EXCLUSIVE)
        holder = guard.living_holder()
        if holder is None and not is_taken and not guard.take(EXCLUSIVE):  # whose lease is over by now
            holder = "another process"
        if holder is not None:
            raise OutputError(
                f"{where}: {holder} is writing here; wait for it or stop it, or leave out --exclusive to "
                "share its work"
            )
        yield
        # While it is held: whoever claims the key after this does so with a version that is not listed here.
        BucketStore(store.bucket, f"{store.folder}/{EXCLUSIVE}").clear()


def refuse_exclusive(store: ClaimStore, lease_s: float, where: str) -> None:
    """Leave a cache alone that a living process has for itself; the claim of one that is gone is taken away.

    Raises:
        OutputError: another process is writing there, and shares with nobody.
    """
    content = store.read(EXCLUSIVE)
    if content is None:
        return
    if (holder := Claims(store, lease_s).living_holder([EXCLUSIVE])) is not None:
        raise OutputError(f"{where}: {holder} is writing here with --exclusive; wait for it or stop it")
    store.delete_if_unchanged(EXCLUSIVE, content)
