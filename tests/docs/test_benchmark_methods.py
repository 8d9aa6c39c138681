"""The runs of benchmarks/methods.py: every recipe has one, with settings that load and known scorers."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from jinja2.sandbox import SandboxedEnvironment

from lightopd.objectives.requirements import needs

FILE = Path(__file__).parents[2] / "benchmarks" / "methods.py"


@pytest.fixture(scope="module")
def methods():
    spec = importlib.util.spec_from_file_location("benchmark_methods", FILE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_has_a_run_and_no_two_runs_share_a_name(methods):
    runs = methods.cases()
    recipes = {path.stem for path in methods.METHODS.glob("*.yaml")}
    assert {case.recipe for case in runs} == recipes
    assert len({case.run for case in runs}) == len(runs)


def test_the_results_are_those_of_the_runs_that_there_are(methods):
    results = json.loads(methods.RESULTS.read_text())
    runs = {
        (f"{case.run} at {rate:g}", case.stand_in, case.changed)
        for case in methods.cases()
        for rate in methods.LEARNING_RATES
    }
    assert {(line["name"], line["stand_in"], line["changed"]) for line in results["results"]} <= runs
    assert results["settings"] == methods.SETTINGS


def test_every_run_loads_with_the_common_settings_and_its_signals_have_a_scorer(methods, tmp_path):
    for case in methods.cases():
        config = methods.config_of(case, tmp_path, 3e-5)
        assert (config.steps, config.batch_sequences, config.optimizer.lr) == (100, 128, 3e-5)
        asked = needs(config.objective)
        assert set(asked.signals) <= set(methods.SIGNALS), case.run
        assert {*asked.texts, *asked.chunks, *asked.shown} <= set(methods.TEXTS), case.run


def test_a_comma_ends_its_total(methods):
    assert methods.turns_of(np.array([5, 5, 0, 6, 0, 7, 1]), comma=0) == [0, 0, 0, 1, 1, 2, 2]


def test_stand_ins_for_a_hint_and_for_wrong_evidence(methods):
    def shown(template, prompt):
        return SandboxedEnvironment().from_string(template).render(prompt=prompt, answer="90")

    assert shown(methods.WITH_ANSWER, "12+7+30+41=") == "90;12+7+30+41="
    assert shown(methods.WITH_WRONG_ADDEND, "12+7+30+50=") == "12+7+30+1="
