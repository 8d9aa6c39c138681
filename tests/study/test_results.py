"""What the study writes survives a crash, and is drawn from runs that are only partly there."""

import re
from pathlib import Path
from statistics import mean

import page
import pytest
from arms import read_arms
from cells import made_once
from pictures import drawn_rows, gains, signature, write_pictures
from recording_disk import RecordingDisk
from scipy.stats import ttest_rel
from summary import NOT_MEASURED, figures, keep_line, read_lines
from tables import overlap_table

ARMS = read_arms()


def line_of(arm, regime="large_gap", seed=0, **figures):
    """A measured run's line."""
    place = {"arm": arm, "regime": regime, "seed": seed, "grid": {}, "tuned": {}, "is_tuning": False}
    return {"key": f"{arm}/{regime}/seed={seed}", "identity": "", **place, "accuracy": 0.5, **figures}


@pytest.fixture
def disk(monkeypatch):
    return RecordingDisk().install(monkeypatch)


def test_a_line_is_there_whole_or_not_at_all(tmp_path, disk):
    keep_line(tmp_path, line_of("live"), tmp_path)
    disk.check_survives(tmp_path / "large_gap" / "live.jsonl")
    assert read_lines(tmp_path, "live") == [line_of("live")]


def test_what_a_cache_cost_is_there_whole_or_not_at_all(tmp_path, disk):
    made_once(tmp_path / "cache", lambda place: place.mkdir() or {"score_seconds": 1.0})
    disk.check_survives(tmp_path / "cache.json")


def test_a_regime_whose_student_was_not_measured_is_left_out_of_the_pictures(tmp_path):
    lines = {name: [] for name in ARMS}
    lines["live"] = [line_of("live", regime) for regime in ("large_gap", "small_gap")]
    lines["untrained"] = [line_of("untrained", "small_gap")]
    write_pictures(tmp_path, ARMS, lines)
    drawn = (tmp_path / "study-arms.svg").read_text()
    assert "small_gap" in drawn
    assert "large_gap" not in drawn


def test_the_page_of_no_results_is_there_whole_or_not_at_all(tmp_path, disk):
    page.write_page(tmp_path / "results", tmp_path)
    disk.check_survives(tmp_path / "study.md")
    assert "Not run: in `large_gap`" in (tmp_path / "study.md").read_text()


def test_the_pictures_are_drawn_from_the_results():
    rows = drawn_rows(ARMS, {name: read_lines(page.RESULTS, name) for name in ARMS})
    drawn = {path.name: path.read_text().splitlines()[-1] for path in page.IMAGES.glob("study-*.svg")}
    assert drawn == {f"study-{name}.svg": signature(own) for name, own in rows.items() if own}, (
        "python benchmarks/study/page.py draws them"
    )


def test_a_picture_s_signature_changes_with_a_figure_and_not_with_its_last_digit():
    row = {"arm": "a", "gain": 0.5, "grid": {"train.steps": 5}}
    assert signature([row]) != signature([row | {"gain": 0.51}])
    assert signature([row]) == signature([row | {"gain": 0.5 + 1e-12}])


def test_a_text_s_figures_are_those_of_the_lines_it_names(tmp_path):
    for seed, (live, jsd) in enumerate([(0.5, 0.4), (0.6, 0.53), (0.7, 0.55)]):
        keep_line(tmp_path, line_of("live", seed=seed, accuracy=live, grid={"a.lr": 0.1}), tmp_path)
        keep_line(tmp_path, line_of("jsd", seed=seed, accuracy=jsd), tmp_path)
    keep_line(tmp_path, line_of("untrained", accuracy=0.55), tmp_path)
    told = figures(tmp_path, "large_gap")
    assert told["figure"]("live") == told["figure"]("live", lr=0.1) == "0.6000 ± 0.2484"
    assert told["gain"]("live") == "+5.0 ± 24.8"
    paired = ttest_rel([0.5, 0.6, 0.7], [0.4, 0.53, 0.55]).pvalue
    assert told["p"]("live", "jsd") == f"p = {paired:.3f}".replace("0.", ".")
    for nothing in (told["figure"]("live", lr=0.2), told["figure"]("live", regime="small_gap")):
        assert nothing == NOT_MEASURED
    assert told["gain"]("semi_opd") == told["p"]("live", "semi_opd") == NOT_MEASURED


def test_no_figure_of_the_page_s_texts_is_missing():
    assert NOT_MEASURED not in page.PAGE.read_text()


def test_runs_are_told_apart_by_the_overlap_that_they_ended_with():
    runs = [
        ("divergence", 0.96, 1.0),
        ("divergence", 0.96, -3.0),
        ("log_ratio", 1.2, 0.5),
        ("constant", 0.1, 9.0),
    ]
    rows = {row.split(" | ")[0]: row for row in overlap_table(runs).splitlines()}
    assert rows["| 0.95 to 0.97"] == "| 0.95 to 0.97 | 0 |  | 2 | -1.0 (-3.0 to +1.0) |"
    assert rows["| 0.995 to 1"] == "| 0.995 to 1 | 1 | +0.5 (+0.5 to +0.5) | 0 |  |"
    assert rows["| 0 to 0.9"] == "| 0 to 0.9 | 0 |  | 0 |  |"


def test_the_readme_s_figures_are_those_of_the_results():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    said = readme.partition("## With which loss it works")[2].partition("\n## ")[0]
    lines = {name: read_lines(page.RESULTS, name) for name in ARMS}
    found = {row["arm"]: row for row in gains(ARMS, lines) if row["regime"] == "large_gap"}
    of = {name: found[ARMS[name].title] for name in ARMS if ARMS[name].title in found}

    gaining = ("reverse_kl", "live_reverse_kl", "trl", "passes_reverse_kl", "more_sft", "passes_more_sft")
    wanted = [f"{of[name]['gain']:+.1f} ± {of[name]['high'] - of[name]['gain']:.1f}" for name in gaining]
    assert re.findall(r"[+-][\d.]+ ± [\d.]+", said) == wanted
    told = figures(page.RESULTS, "large_gap")["figure"]
    assert f"from 0.90 to {told('order_reverse_kl', digits=2, lr=1e-4)}" in said
    lost = [float(told(name).split()[0]) for name in ("live", "fast_lightning")]
    assert f"{100 * (lost[0] - lost[1]):.1f} points behind live ones" in said
    assert of["lightning"]["low"] <= 0
    assert of["live"]["low"] <= 0

    own = {name: [line for line in lines[name] if line["regime"] == "large_gap"] for name in lines}
    seconds = [
        mean_seconds(own["reverse_kl"], "rollout_seconds") + mean_seconds(own["reverse_kl"], "score_seconds")
    ]
    seconds += [mean_seconds(own[name], "train_seconds") for name in ("reverse_kl", "trl")]
    assert re.findall(r"(\d+) s\b", said) == [f"{one:.0f}" for one in seconds]
    bytes_per_token = [
        line["bytes_per_token"] for line in own["top_k"] if line["grid"] == {"precompute.top_k": 1}
    ]
    assert re.findall(r"(\d+) bytes a token", said) == [f"{mean(bytes_per_token):.0f}"]


def test_what_other_pages_say_of_the_map_is_what_the_results_say():
    gain = figures(page.RESULTS, "large_gap")["gain"]
    at = {
        (arm, rollouts): f"{abs(float(gain(arm, lr=1e-4, batch_sequences=rollouts).split()[0])):.1f}"
        for arm in ("map", "map_reverse_kl")
        for rollouts in (64, 2048)
    }
    pages = Path(__file__).parents[2] / "docs"
    guide, training = (pages / "methods" / "README.md").read_text(), (pages / "training.md").read_text()
    lost = f"lost {at['map_reverse_kl', 64]} points, where the paper's loss lost {at['map', 64]}"
    assert lost in " ".join(guide.split())
    assert f"lost {at['map', 2048]} to {at['map', 64]} points at 1e-4" in " ".join(training.split())


def test_the_rows_of_the_decision_on_the_default_are_those_of_the_results():
    told = figures(page.RESULTS, "large_gap")
    decision = (Path(__file__).parents[2] / "docs" / "decisions" / "0013-default-objective.md").read_text()
    for regime in ("large_gap", "other_teacher", "backwards", "small_gap", "long_answers"):
        cells = [told["figure"](arm, regime=regime) for arm in ("untrained", "lightning", "reverse_kl")]
        assert f"| `{regime}`, accuracy | {' | '.join(cells)} |" in decision
    cells = [
        told["figure"](arm, "reverse_kl_nats", 3, regime="smollm2") for arm in ("lightning", "reverse_kl")
    ]
    assert " | ".join(cells) in decision


def mean_seconds(lines, part):
    """Of the measured runs."""
    return mean(line[part] for line in lines if not line["is_tuning"])
