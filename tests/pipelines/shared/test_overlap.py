"""Making and writing side by side."""

import threading

import pytest

from lightopd.pipelines.shared.overlap import make_and_write


def test_everything_is_made_written_and_told_in_order():
    written, told = [], []
    make_and_write(range(5), lambda i: i * i, lambda i, made: written.append((i, made)), told.append)
    assert written == [(i, i * i) for i in range(5)]
    assert told == list(range(5))


def test_the_next_is_made_while_the_last_is_written():
    second_is_made = threading.Event()

    def make(item):
        if item == 1:
            second_is_made.set()
        return item

    def write(item, made):
        assert item != 0 or second_is_made.wait(10), "making waited for writing"

    make_and_write(range(2), make, write, lambda item: None)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_was_made_is_written_when_the_next_cannot_be_made(error):
    written = []

    def make(item):
        if item == 2:
            raise error
        return item

    with pytest.raises(type(error)):
        make_and_write(range(5), make, lambda item, made: written.append(item), lambda item: None)
    assert written == [0, 1]


def test_a_write_that_fails_ends_the_work():
    made = []

    def write(item, _):
        if item == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_and_write(range(9), lambda i: made.append(i), write, lambda item: None)
    assert made == [0, 1, 2]
