"""Signals: SIGTERM raises as Ctrl-C does, and both may wait for a place where a stop does no harm."""

import os
import signal
import time

import pytest

from lightopd.stopping import Terminated, sigterm_raises, stops_wait


def test_sigterm_is_taken_once_and_never_in_a_forked_process():
    with sigterm_raises() as is_terminated:
        is_up, says_up = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(says_up, b"1")
            time.sleep(20)
            os._exit(0)
        os.read(is_up, 1)  # a signal that comes before Python is set up after the fork is lost
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert is_terminated()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_stop_waits_until_it_is_allowed(number, raised):
    with sigterm_raises(), stops_wait() as allow_stop:
        allow_stop()
        signal.raise_signal(number)
        with pytest.raises(raised):
            allow_stop()


def test_a_stop_that_is_never_allowed_comes_after_the_grace_period():
    with sigterm_raises(), stops_wait(grace_s=0.05):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Terminated):
            time.sleep(20)


def test_a_second_signal_stops_at_once():
    with sigterm_raises(), stops_wait():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stops_wait() as allow_stop:
            signal.raise_signal(signal.SIGINT)
            allow_stop()
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
