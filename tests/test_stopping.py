"""Signals: SIGTERM raises as Ctrl-C does, and both may wait for a place where a stop does no harm."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lightopd.stopping import Terminated, sigterm_raises, stops_wait, undisturbed


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
    with sigterm_raises(), stops_wait(grace_s=1.0):
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


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_stop_in_an_undisturbed_block_takes_effect_at_its_end(number, raised):
    done = []

    def work():
        with undisturbed():
            signal.raise_signal(number)
            done.append("the rest of the block")

    with sigterm_raises(), pytest.raises(raised):
        work()
    assert done == ["the rest of the block"]


def test_an_error_of_an_undisturbed_block_does_not_hide_a_stop():
    def work():
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError

    with sigterm_raises(), pytest.raises(Terminated):
        work()


INTERRUPTED = """
import faulthandler, signal, sys, threading, time
from lightopd.cache.claims.claims import Claims
from lightopd.cache.claims.store import FolderStore
from lightopd.pipelines.shared.overlap import make_and_write
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
faulthandler.dump_traceback_later(60, exit=True)
num_taken = 0


def overlapping():
    make_and_write(range(3), lambda item: item, lambda *_: time.sleep(0.01), lambda _: None)


def claiming():
    with Claims(FolderStore(Path(sys.argv[1])), 0.2):
        time.sleep(0.01)


def is_interrupted_at(number, work):
    def on_event(frame, event, _):
        global num_taken
        if event == "return" and frame.f_code is threading.Condition.__enter__.__code__:
            num_taken += 1
            if num_taken == number:
                signal.raise_signal(signal.SIGINT)

    global num_taken
    num_taken = 0
    sys.setprofile(on_event)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return num_taken >= number


for work in (overlapping, claiming):
    number = 1
    while is_interrupted_at(number, work):
        number += 1
    print(work.__name__, number - 1, flush=True)
"""


def test_a_stop_at_the_moment_a_lock_is_taken_leaves_no_thread_waiting_for_ever(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (_, overlapping), (_, claiming) = (line.split() for line in done.stdout.splitlines())
    assert int(overlapping) >= 5
    assert int(claiming) >= 1
