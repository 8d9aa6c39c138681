"""The line that training says every ten seconds."""

import math

from lightopd.training.callbacks import drift_words


def test_gap_and_w_stand_in_the_line_where_they_were_measured():
    assert drift_words({"log_ratio": -0.214, "w_mean": 0.981}) == ", gap 0.214, w 0.981"
    assert drift_words({"loss": 1.0}) == ""
    assert drift_words({"log_ratio": math.nan, "w_mean": 1.0}) == ", w 1"
