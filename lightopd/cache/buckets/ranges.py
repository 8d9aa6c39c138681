"""Pieces of shards that stay at their URL: what SQL reads of large ones, and the ends of all."""

import threading
from collections import OrderedDict

from lightopd.cache.buckets.mirrors import Mirror
from lightopd.cache.buckets.stores.object_reader import PIECE_BYTES
from lightopd.cache.buckets.stores.opened import opened

BLOCK_BYTES = 64 * 1024
"""Least that is asked for, and what a shard's end is expected to fit in."""
MOST_BLOCKS = 2048


class Ranges:
    """Blocks of a URL's objects, the most recently used of them in memory; threads may share it."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._reader = opened(mirror.url)
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, length: int) -> bytes:
        """So many bytes of an object.

        Raises:
            InputError: the store cannot be read.
        """
        first, last = start // BLOCK_BYTES, (start + length - 1) // BLOCK_BYTES
        blocks = [self._known(name, number) for number in range(first, last + 1)]
        missing = [first + place for place, block in enumerate(blocks) if block is None]
        if missing:
            fetched = self._fetched(name, missing[0], missing[-1])
            blocks[missing[0] - first : missing[-1] - first + 1] = fetched
        begin = start - first * BLOCK_BYTES
        return b"".join(block for block in blocks if block is not None)[begin : begin + length]

    def _known(self, name: str, number: int) -> bytes | None:
        with self._lock:
            block = self._blocks.get((name, number))
            if block is not None:
                self._blocks.move_to_end((name, number))
            return block

    def _fetched(self, name: str, first: int, last: int) -> list[bytes]:
        """Blocks in one request, or in pieces where they are many."""
        begin, end = first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, self._mirror.sizes[name])
        starts = range(begin, end, PIECE_BYTES)
        content = b"".join(
            self._reader.read_range(name, start, min(PIECE_BYTES, end - start)) for start in starts
        )
        blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
        with self._lock:
            self._blocks |= {(name, first + place): block for place, block in enumerate(blocks)}
            while len(self._blocks) > MOST_BLOCKS:
                self._blocks.popitem(last=False)
        return blocks
