"""Several requests at a time, and the first failure ends the rest."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def at_once(jobs: int, do: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `do` makes of each item, as it comes, `jobs` under way; a failure drops those that wait."""
    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="bucket") as executor:
        try:
            for future in as_completed([executor.submit(do, item) for item in items]):
                yield future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
