"""Durations in words, and the line that a terminal redraws."""

import io
import logging

import pytest

from lightopd.telling import LIVE, LogLines, duration, live_line_cleared


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log():
    """The package's logger at DEBUG, without other handlers."""
    logger = logging.getLogger("lightopd")
    before = logger.level, logger.handlers
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.level, logger.handlers = before


def test_a_duration_is_hours_minutes_and_seconds():
    assert [duration(seconds) for seconds in (0.4, 65, 3 * 3600 + 59)] == ["0:00:00", "0:01:05", "3:00:59"]


def test_a_terminal_redraws_live_lines_and_keeps_the_others(log, monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    stream = Terminal()
    log.handlers = [LogLines(stream)]
    log.debug("step 1, loss 0.2", extra=LIVE)
    log.info("step 2, loss 0.1", extra=LIVE)
    log.info("saved")
    log.debug("a detail")
    assert stream.getvalue().startswith("\r\x1b[2Kstep 1, los\r\x1b[2Kstep 2, los\r\x1b[2K")
    assert stream.getvalue().endswith(" saved\n")
    assert "detail" not in stream.getvalue()


def test_a_log_file_has_the_live_lines_that_are_information_alone(log):
    stream = io.StringIO()
    log.handlers = [LogLines(stream)]
    log.debug("step 1", extra=LIVE)
    log.info("step 2", extra=LIVE)
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["step 2"]
    assert "\x1b" not in stream.getvalue()


def test_no_live_line_is_left_after_an_error(log):
    stream = Terminal()
    log.handlers = [LogLines(stream)]

    def fails():
        with live_line_cleared():
            log.info("step 1", extra=LIVE)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    assert stream.getvalue().endswith("\r\x1b[2K")
