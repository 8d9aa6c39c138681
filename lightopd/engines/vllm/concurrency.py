"""Many requests at once, as many as fit in memory, for engines that reply asynchronously."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from lightopd.under_way import so_far

Result = TypeVar("Result")


class LoopThread:
    """An event loop in a thread of its own, so that it can be used where a loop already runs (notebooks)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lightopd-engine", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Wait for a coroutine; an interrupt of the wait (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def cancel(self) -> None:
        """Cancel what still runs, and wait until it has ended."""
        self.run(_cancel_others())

    def close(self) -> None:
        """Cancel what still runs and end the thread; closing twice is allowed."""
        if self.is_closed:
            return
        self.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def run_all(
    ask: Callable[[int], Awaitable[Result]], sizes: Sequence[int], budget: int, most: int | None = None
) -> list[Result]:
    """Results of `ask(0)` to `ask(len(sizes) - 1)`, in that order; the largest are asked first.

    Requests are begun one by one while their sizes together stay within the budget; one that is larger runs
    alone. The first error cancels the others and is raised.

    Args:
        ask: makes one request.
        sizes: of each request and its reply, in any unit.
        budget: most of that unit at once.
        most: most requests at once; None for no limit.
    """
    waiting = sorted(range(len(sizes)), key=lambda index: (sizes[index], -index))
    finished: asyncio.Queue[asyncio.Task[Result]] = asyncio.Queue()
    running: dict[asyncio.Task[Result], int] = {}
    results: dict[int, Result] = {}
    in_use = 0
    try:
        while waiting or running:
            while waiting and _fits(len(running), most, in_use + sizes[waiting[-1]], budget):
                index = waiting.pop()
                in_use += sizes[index]
                task = asyncio.ensure_future(_await(ask(index)))
                task.add_done_callback(finished.put_nowait)
                running[task] = index
            done = await finished.get()
            index = running.pop(done)
            in_use -= sizes[index]
            results[index] = done.result()
            so_far(f"{len(results):,} of {len(sizes):,} requests")
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [results[index] for index in range(len(sizes))]


def _fits(num_running: int, most: int | None, in_use: int, budget: int) -> bool:
    return num_running == 0 or (in_use <= budget and (most is None or num_running < most))


async def _await(awaitable: Awaitable[Result]) -> Result:
    return await awaitable
