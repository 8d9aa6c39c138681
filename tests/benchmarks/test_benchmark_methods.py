"""The runs of every recipe on the tiny task: settings that load, known scorers, results of today."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import SandboxedEnvironment

from lightopd.objectives.requirements import needs
from lightopd.rewards.running_totals import running_totals

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"


@pytest.fixture(scope="module")
def methods():
    sys.path.insert(0, str(STUDY))
    import methods

    return methods


@pytest.fixture(scope="module")
def cases(methods):
    return methods.cases()


def test_every_recipe_has_a_run_and_no_two_runs_share_a_name(methods, cases):
    recipes = {path.stem for path in methods.METHODS.glob("*.yaml")}
    assert {case.recipe for case in cases} == recipes
    assert len({case.run for case in cases}) == len(cases)


def test_the_results_are_those_of_the_runs_and_settings_that_there_are(methods, cases):
    runs = {case.run: case for case in cases}
    names = {path.stem for path in methods.RESULTS.glob("*/*.jsonl")} - {"untrained"}
    assert names <= set(runs)
    for name in names:
        for line in methods.read_lines(methods.RESULTS, name):
            wanted = methods.line_of(runs[name], line["tuned"][methods.RATE], line["seed"])
            assert wanted.items() <= line.items(), line["key"]


def test_every_run_loads_with_the_common_settings_and_its_signals_have_a_scorer(methods, cases, tmp_path):
    for case in cases:
        config = methods.config_of(case, tmp_path / "plain", 1e-4, 3)
        found = (config.steps, config.batch_sequences, config.optimizer.lr, config.seed)
        assert found == (100, 128, 1e-4, 3)
        asked = needs(config.objective)
        assert set(asked.signals) <= set(methods.SIGNALS), case.run
        assert {*asked.texts, *asked.chunks, *asked.shown} <= set(methods.TEXTS), case.run


def test_no_seed_has_the_prompts_that_the_student_was_fine_tuned_on(methods):
    finetuned = {row["prompt"] for row in running_totals(methods.FINETUNING_PROMPTS_SEED, 3000)}
    for seed in (*range(methods.SEEDS), methods.TUNING_SEED):
        asked = methods.training_prompts(seed)
        prompts = {row["prompt"] for row in running_totals(asked["seed"], asked["count"], asked["split"])}
        assert len(prompts & finetuned) < 0.01 * len(prompts)


def test_the_identity_of_a_run_changes_with_its_prompts_and_with_what_made_its_signals(methods, monkeypatch):
    (case,) = [one for one in methods.cases() if one.run == "lightning_opd"]
    settings = methods.settings_of(case, Path("seed"), 1e-4, 0)
    found = methods.identity(case, settings, 0)
    assert found != methods.identity(case, settings, 2)
    teacher = methods.SIGNALS["teacher"]
    monkeypatch.setitem(methods.SIGNALS, "teacher", replace(teacher, template="{{ prompt }}"))
    assert found != methods.identity(case, settings, 0)


def test_a_comma_ends_its_total(methods):
    assert methods.turns_of(np.array([5, 5, 0, 6, 0, 7, 1]), comma=0) == [0, 0, 0, 1, 1, 2, 2]


def test_stand_ins_for_a_hint_and_for_wrong_evidence(methods):
    import method_cases

    def shown(template, prompt):
        return SandboxedEnvironment().from_string(template).render(prompt=prompt, answer="90")

    assert shown(method_cases.WITH_ANSWER, "12+7+30+41=") == "90;12+7+30+41="
    assert shown(method_cases.WITH_WRONG_ADDEND, "12+7+30+50=") == "12+7+30+1="


def test_it_runs_on_the_cpu_whatever_is_there_and_refuses_a_recipe_that_is_not(methods, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("sys.argv", ["methods", "--minutes", "0", "--only", "opsd"])
    methods.main()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr("sys.argv", ["methods", "--only", "no_such_recipe"])
    with pytest.raises(SystemExit) as ended:
        methods.main()
    told = capsys.readouterr().err
    assert (ended.value.code, "no_such_recipe" in told, "opsd" in told) == (2, True, True), told
