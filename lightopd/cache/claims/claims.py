"""Claims: who makes which shard, when several processes make the shards of one cache.

A claim is a lease. A thread renews it while its holder works; whoever sees that it was not renewed for as
long as it says, by a clock of his own, takes it over. So the clocks of two machines are never compared. That
the process of a holder has ended, others of the same machine find out at once.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from lightopd.cache.claims.holders import Holder, holder_of, this_process
from lightopd.cache.claims.store import ClaimStore
from lightopd.errors import LightopdError
from lightopd.stopping import undisturbed

log = logging.getLogger(__name__)

RENEWALS = 4
"""Renewals in one lease: three may be late or fail before it is over."""
MOST_LEASE_S = 86_400.0
"""Of a claim that someone else wrote, no more than this is believed."""


@dataclass(frozen=True, slots=True)
class _Claim:
    holder: Holder | None
    """None where the content cannot be read."""
    lease_s: float


class Claims:
    """The claims that this process holds, renewed by a thread until they are released.

    Args:
        store: where they lie.
        lease_s: a claim that is not renewed for so long is anyone's.
        clock: seconds of this process alone.
    """

    def __init__(
        self, store: ClaimStore, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.holder = this_process()
        self._store, self._lease_s, self._clock = store, lease_s, clock
        self._held: dict[str, bytes] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._beat = 0
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_regularly, daemon=True, name="claims")

    def __enter__(self) -> "Claims":
        with undisturbed():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            self._ended.set()
        self._thread.join()
        for key in tuple(self._held):
            self.release(key)

    def take(self, key: str) -> bool:
        """Claim a key that nobody holds, or whose holder is gone; whether this process holds it now."""
        with self._lock:
            if key in self._held:
                return True
            found, own = self._store.read(key), self._content()
            if found is None:
                is_taken = self._store.put_if_absent(key, own)
            elif self._is_over(key, found):
                is_taken = self._store.replace_if_unchanged(key, found, own)
                if is_taken:
                    log.info("%s: taken over from %s, which gave no sign of life", key, _name(found))
            else:
                return False
            if is_taken:
                self._held[key] = own
            return is_taken

    def holds(self, key: str) -> bool:
        """Whether this process holds a claim, after a look at where it lies."""
        with self._lock:
            return key in self._held and self._store.read(key) == self._held[key]

    def release(self, key: str) -> None:
        """Let go of a claim, for others to take; nothing where it is not held."""
        with self._lock:
            content = self._held.pop(key, None)
            if content is not None:
                try:
                    self._store.delete_if_unchanged(key, content)
                except (OSError, LightopdError) as error:
                    log.warning("%s: its claim could not be released (%s); it ends by itself", key, error)

    def renew(self) -> None:
        """Renew every claim once; one that was taken over is held no longer."""
        with self._lock:
            for key, content in tuple(self._held.items()):
                own = self._content()
                try:
                    if self._store.replace_if_unchanged(key, content, own):
                        self._held[key] = own
                        continue
                    is_finished = self._store.read(key) is None  # all is, and the claims were cleared
                except (OSError, LightopdError) as error:
                    log.warning("%s: its claim could not be renewed (%s); trying again", key, error)
                    continue
                del self._held[key]
                if not is_finished:
                    log.warning(
                        "%s: another process took it over; this one gave no sign of life in time", key
                    )

    def other_holder(self) -> str | None:
        """Someone else's process that has a claim here and is not known to be gone, in words."""
        for key in self._store.all_keys():
            content = self._store.read(key)
            holder = _read(content, self._lease_s).holder if content else None
            if holder is not None and holder.token != self.holder.token and not holder.is_gone():
                return holder.name
        return None

    def living_holder(self, keys: Sequence[str] | None = None) -> str | None:
        """Someone else's process that has one of the claims, in words; None where none of them is renewed.

        Takes as long as a lease where a claim is of another machine.

        Args:
            keys: of the claims; None takes all.
        """
        others = [key for key in keys or self._store.all_keys() if key not in self._held]
        first = {key: content for key in others if (content := self._store.read(key))}
        claims = {key: _read(content, self._lease_s) for key, content in first.items()}
        live = {key: claim for key, claim in claims.items() if not (claim.holder and claim.holder.is_gone())}
        end_s = self._clock() + max((claim.lease_s for claim in live.values()), default=0.0)
        while live and self._clock() < end_s:
            for key in live:
                if self._store.read(key) not in (first[key], None):
                    return _name(first[key])
            time.sleep(min(1.0, self._lease_s / RENEWALS))
        return None

    def _renew_regularly(self) -> None:
        while not self._ended.wait(self._lease_s / RENEWALS):
            self.renew()

    def _is_over(self, key: str, found: bytes) -> bool:
        claim = _read(found, self._lease_s)
        if claim.holder is not None and claim.holder.is_gone():
            return True
        content, since_s = self._seen.get(key, (b"", 0.0))
        if content != found:
            self._seen[key] = found, self._clock()
            return False
        return self._clock() - since_s >= claim.lease_s

    def _content(self) -> bytes:
        self._beat += 1
        told = {**self.holder.as_json(), "lease_s": self._lease_s, "beat": self._beat}
        return json.dumps(told, sort_keys=True).encode()


def _read(content: bytes, lease_s: float) -> _Claim:
    """A claim; one that cannot be read, as after a power failure, is of nobody and lasts as our own do."""
    try:
        plain = json.loads(content)
        return _Claim(holder_of(plain), min(float(plain["lease_s"]), MOST_LEASE_S))
    except (ValueError, TypeError, KeyError):
        return _Claim(None, lease_s)


def _name(content: bytes) -> str:
    holder = _read(content, 0.0).holder
    return "a process" if holder is None else holder.name
