"""Two steps of a stage side by side: while a shard is written, the next one is scored."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lightopd.stopping import result_of, undisturbed

Item = TypeVar("Item")
Made = TypeVar("Made")


def make_and_write(
    items: Iterable[Item],
    make: Callable[[Item], Made],
    write: Callable[[Item, Made], None],
    done: Callable[[Item], None],
) -> None:
    """Make each item here, in order, and write it in a thread beside the making of the next.

    At most two made items are held. When making fails or is interrupted, the write that is under way ends
    first, so that nothing made is lost.

    Args:
        items: in the order to be made.
        make: the work on an engine, in the calling thread.
        write: puts what was made where it belongs; one at a time, in order.
        done: told of each item after it is written, in the calling thread.

    Raises:
        Exception: whatever `make` or `write` raises; of two at once, that of `make`.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as pool:
        under_way: tuple[Item, Future[None]] | None = None
        for item in items:
            made = make(item)
            _finish(under_way, done)
            with undisturbed():
                under_way = item, pool.submit(write, item, made)
        _finish(under_way, done)


def _finish(under_way: tuple[Item, Future[None]] | None, done: Callable[[Item], None]) -> None:
    if under_way is not None:
        item, future = under_way
        result_of(future)
        done(item)
