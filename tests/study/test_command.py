"""The study's command: which runs it makes, in which order, and what it says of them."""

import ast
import importlib.metadata
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import page
import pytest
import torch
from arms import Arm, Cell, read_arms
from cells import QUICK, TRAININGS, identity, run_of
from summary import read_lines

ARMS = read_arms()
ROOT = Path(__file__).parents[2]
UNTRAINED = Arm(title="", questions=(1,), regimes=("large_gap",), kind="untrained", run=dict(QUICK), seeds=1)


def test_an_arm_with_settings_of_another_comes_after_it_and_never_without_them(study):
    order = [name for name, _ in study.searching_first(ARMS)]
    borrowing = {name: arm for name, arm in ARMS.items() if arm.tuned_like}
    assert borrowing
    assert all(order.index(arm.tuned_like) < order.index(name) for name, arm in borrowing.items())
    with pytest.raises(SystemExit, match="live_jsd takes its settings from jsd, which has none in large_gap"):
        list(study.measured_cells("live_jsd", ARMS["live_jsd"], "large_gap", None))
    assert study.remaining_hours(ARMS, None, None) > 1


def test_a_finished_run_is_not_run_again_while_its_settings_stay(study):
    arm = Arm(title="", questions=(1,), regimes=("large_gap",), kind="untrained", run=dict(QUICK))
    cell = Cell("a", "large_gap", (), (), 0)

    def seconds(arm):
        study.run_cells("a", arm, iter([cell]), math.inf, waits=False)
        [line] = read_lines(study.RESULTS, "a")
        assert 0.5 < line["accuracy"] <= 1.0
        return line["seconds"], line["identity"]

    first = seconds(arm)
    assert seconds(arm.model_copy(update={"title": "other"})) == first
    changed = arm.model_copy(update={"run": {**QUICK, "eval_prompts": {"count": 32}}})
    assert seconds(changed)[1] != first[1]


def test_a_run_that_another_process_is_at_is_left_to_it(study):
    arm = Arm(title="", questions=(1,), regimes=("large_gap",), kind="untrained", run=dict(QUICK))
    cell = Cell("a", "large_gap", (), (), 0)
    with study.alone_at(study.place_of_lock(cell)):
        study.run_cells("a", arm, iter([cell]), math.inf, waits=False)
    assert not read_lines(study.RESULTS, "a")


def test_a_setting_chosen_anew_takes_the_place_of_the_one_before(study):
    for rate, seed in ((1e-5, 0), (1e-5, 1), (1e-4, 0)):
        line = {"key": f"a/r/lr={rate}/seed={seed}", "arm": "a", "regime": "r", "grid": {}, "seed": seed}
        study.keep_line(study.RESULTS, line | {"tuned": {"lr": rate}, "is_tuning": False}, study.WORK)
    assert {(one["seed"], one["tuned"]["lr"]) for one in read_lines(study.RESULTS, "a")} == {
        (0, 1e-4),
        (1, 1e-5),
    }


def test_what_others_are_compared_with_is_measured_first(study):
    order = [arm.trains for _, arm in study.searching_first(ARMS)]
    assert order == sorted(order)


def test_a_command_whose_time_is_up_takes_no_other_run(study):
    study.run_arm("a", UNTRAINED, -math.inf, None, None)
    assert read_lines(study.RESULTS, "a") == []
    study.run_arm("live_jsd", ARMS["live_jsd"], -math.inf, "large_gap", None)  # asks no other arm's settings
    assert read_lines(study.RESULTS, "live_jsd") == []


def test_hours_to_go_are_those_of_the_runs_without_a_line_at_the_settings_of_now(study):
    study.run_arm("a", UNTRAINED, math.inf, None, None)
    assert study.remaining_hours({"a": UNTRAINED}, None, None) == 0.0
    changed = UNTRAINED.model_copy(update={"run": {**QUICK, "eval_prompts": {"count": 32}}})
    [line] = read_lines(study.RESULTS, "a")
    assert study.remaining_hours({"a": changed}, None, None) == line["seconds"] / 3600


def test_models_are_not_made_to_count_the_runs_that_need_them(study, tmp_path):
    arm = UNTRAINED.model_copy(update={"regimes": ("small_gap",)})
    line = {"key": "a/small_gap/seed=0", "identity": "", "arm": "a", "regime": "small_gap", "seed": 0}
    line |= {"grid": {}, "tuned": {}, "is_tuning": False, "seconds": 36.0}
    study.keep_line(study.RESULTS, line, tmp_path)
    assert study.remaining_hours({"a": arm}, None, None) == pytest.approx(0.01)
    assert study.missing_models({"a": arm}, None) == ["student of small_gap"]
    crossing = {"cross_lightning": ARMS["cross_lightning"]}
    assert study.missing_models(crossing, None) == ["teacher other"]
    assert study.missing_models({"live": ARMS["live"]}, "long_answers") == [
        "student of long_answers",
        "teacher eight",
    ]
    assert not (tmp_path / "models").exists()


def test_a_line_tells_its_machine_and_versions_but_no_name_and_no_folder(study):
    study.run_arm("a", UNTRAINED, math.inf, None, None)
    [line] = read_lines(study.RESULTS, "a")
    assert line["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert {"architecture", "processor", "num_cpus"} <= set(line["machine"])
    assert line["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(line["versions"]) == {"lightopd", "python", "torch", "transformers"}
    [table, earlier] = page.machines([line, line, {"key": "of an older run"}])
    assert table.splitlines()[2].startswith("| 2 | ")
    assert earlier == "1 earlier runs recorded neither machine nor versions."


def test_a_run_on_the_gpu_is_another_one_than_on_the_cpu(tmp_path):
    run = run_of(UNTRAINED, Cell("a", "large_gap", (), (), 0), tmp_path)
    assert identity(run, UNTRAINED, "cuda") != identity(run, UNTRAINED, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(study, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "--device", "cuda"])
    with pytest.raises(
        SystemExit, match="--device cuda: torch finds no GPU here; leave it out to run on the"
    ):
        study.main()
    assert not (study.WORK / "locks").exists()


def test_make_hands_the_device_on():
    said = subprocess.run(
        ["make", "-n", "study", "DEVICE=cuda"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "benchmarks/study --device cuda --minutes 8" in said.stdout


@pytest.mark.parametrize("unknown", [["--only", "lightening"], ["--regime", "no_gap"]])
def test_an_arm_or_a_regime_that_is_not_there_is_refused_with_those_that_are(
    study, monkeypatch, capsys, unknown
):
    monkeypatch.setattr("sys.argv", ["study", *unknown])
    with pytest.raises(SystemExit) as ended:
        study.main()
    told = capsys.readouterr().err
    assert (ended.value.code, unknown[1] in told, "choose from" in told) == (2, True, True), told


def test_the_quick_form_runs_every_kind_but_trl_s(study):
    assert {arm.kind for arm in read_arms(study.QUICK_ARMS).values()} == set(TRAININGS) - {"trl"}


def test_the_quick_form_writes_a_page_of_its_runs_and_leaves_the_docs_alone(study, monkeypatch):
    written = []

    def write_page(results, docs):
        assert docs != page.PAGE.parent
        page.write_page(results, docs)
        written.append((docs / "study.md").read_text())

    monkeypatch.setattr(study, "write_page", write_page)
    study.run_quick(read_arms(("untrained",)))
    assert "1 runs, 0.0 hours of runs" in written[0]
    assert not study.RESULTS.exists()


def test_the_command_of_a_table_names_arms_of_its_regime_and_those_whose_settings_they_take():
    commands = re.findall(r"`python benchmarks/study --regime (\w+) --only ([\w ]+)`", page.page())
    assert len(commands) > 5
    for regime, names in commands:
        asked = [ARMS[name] for name in names.split()]
        assert all(regime in arm.regimes for arm in asked)
        assert {arm.tuned_like for arm in asked if arm.tuned_like} <= set(names.split())


def test_every_package_that_the_study_imports_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]
    known = {
        re.match(r"[\w-]+", one)[0].lower()
        for one in (*declared["dependencies"], *extras["dev"], *extras["report"])
    }
    files = [*(ROOT / "benchmarks" / "study").glob("*.py"), ROOT / "docs" / "generate.py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {one.name for node in nodes if isinstance(node, ast.Import) for one in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"lightopd"}
    packages = importlib.metadata.packages_distributions()
    lacking = {name for name in imported if name in packages and packages[name][0].lower() not in known}
    assert not lacking
