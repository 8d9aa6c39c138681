"""What is under way, and how far it is: told on a terminal when nothing else was said for a while."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class _Work:
    what: str
    so_far: str = ""


_under_way: list[_Work] = []


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Within, `what` is what a person is told when nothing else was said for a while."""
    work = _Work(what)
    _under_way.append(work)
    try:
        yield
    finally:
        _under_way[:] = [other for other in _under_way if other is not work]


def so_far(how_far: str) -> None:
    """How far the innermost work is, such as `1,200 of 9,000 tokens`; nothing where none is under way."""
    if _under_way:
        _under_way[-1].so_far = how_far


def each_told(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, each one's number told while it is worked on."""
    with doing(what):
        for number, item in enumerate(items, start=1):
            so_far(f"{number} of {len(items)}")
            yield item


def now_doing() -> str | None:
    """What is under way, the innermost, and how far it is; None where nobody said."""
    if not _under_way:
        return None
    work = _under_way[-1]
    return f"{work.what}, {work.so_far}" if work.so_far else work.what
