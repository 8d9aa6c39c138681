"""The line that training says every ten seconds, and redraws on a terminal."""

import logging
import math

from lightopd.training.callbacks import ProgressLine, drift_words


class Main:
    is_global_zero = True


class At:
    metrics = {"loss": 0.5, "tokens_per_second": 300.0}  # noqa: RUF012

    def __init__(self, step):
        self.step = step


def lines_at(steps_at_s, caplog):
    """(level, line) of steps that end at these seconds, of a run that starts at 100 s."""
    seconds = iter([100.0, *steps_at_s.values()])
    progress = ProgressLine(steps=20, clock=lambda: next(seconds))
    caplog.set_level(logging.DEBUG)
    progress.on_train_start(None, At(0))
    for step in steps_at_s:
        progress.on_train_batch_end(Main(), At(step))
    assert all(record.is_live for record in caplog.records)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_log_has_a_line_every_ten_seconds_with_time_left_and_rate(caplog):
    lines = lines_at({2: 104.0, 5: 110.0, 6: 112.0, 10: 120.0}, caplog)
    assert [line for level, line in lines if level == "INFO"] == [
        "step 5/20, 0:00:30 left, loss 0.5, 300 tokens/s",
        "step 10/20, 0:00:20 left, loss 0.5, 300 tokens/s",
    ]


def test_a_terminal_has_the_steps_between_at_most_four_times_a_second(caplog):
    lines = lines_at({1: 100.1, 2: 100.5, 3: 100.6, 4: 100.8}, caplog)
    assert [(level, line.split(",")[0]) for level, line in lines] == [
        ("DEBUG", "step 2/20"),
        ("DEBUG", "step 4/20"),
    ]


def test_gap_and_w_stand_in_the_line_where_they_were_measured():
    assert drift_words({"log_ratio": -0.214, "w_mean": 0.981}) == ", gap 0.214, w 0.981"
    assert drift_words({"loss": 1.0}) == ""
    assert drift_words({"log_ratio": math.nan, "w_mean": 1.0}) == ", w 1"
