"""Every shipped recipe parses, says what it is, and has a page that says the rest."""

import re
from pathlib import Path

import pytest
from objective_cases import METHODS

from lightopd.config import build, read_yaml
from lightopd.errors import ConfigError
from lightopd.pipelines.methods import Method, list_methods
from lightopd.schemas.configs import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted({*(ROOT / "docs" / "methods").glob("*.md")} - {ROOT / "docs" / "methods" / "README.md"})
ALL = list_methods(METHODS)
each_method = pytest.mark.parametrize("method", ALL, ids=[method.name for method in ALL])
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])


def page_of(method: Method) -> str:
    return (ROOT / method.page).read_text(encoding="utf-8")


@each_method
def test_a_recipe_is_a_part_of_a_train_config(method):
    config = build(TrainConfig, {**method.settings, "cache": "cache", "student": "student", "out": "out"})
    assert config.objective == method.objective
    assert {"steps", "batch_sequences", "optimizer"} <= method.settings.keys()


@pytest.mark.parametrize("text", ["steps: 1\nsteps: 2\n", "objective:\n  target: mle\n  target: reward\n"])
def test_a_key_or_part_given_twice_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"key '(steps|target)' is given twice.* line [23]"):
        read_yaml(str(path))


@each_method
def test_a_recipe_has_a_page_that_names_it_and_what_it_needs(method):
    page = page_of(method)
    assert f"`{method.name}`" in re.search(r"^Recipes: (.*)$", page, re.MULTILINE).group(1)
    for name in (*method.needs.signals, *method.needs.columns):
        assert f"`{name}`" in page, name


FORMS = {"tail": "bucket form", "renormalised": "renormalised", "stop_gradient": "stop_gradient"}
COMPARING = [
    (method, term.target)
    for method in ALL
    for term in method.objective.terms
    if term.target.kind == "divergence"
]


@pytest.mark.parametrize(("method", "target"), COMPARING, ids=[method.name for method, _ in COMPARING])
def test_the_page_of_a_divergence_says_over_what_it_is_summed_and_what_the_paper_says(method, target):
    said = re.search(r"^\*\*Vocabulary\.\*\* (.*?)\n\n", page_of(method), re.MULTILINE | re.DOTALL)
    assert said, f"{method.page} needs a paragraph that begins with **Vocabulary.**"
    words = " ".join(said.group(1).split())
    assert FORMS[target.support] in words
    assert "paper" in words


@each_page
def test_a_page_belongs_to_recipes_that_exist(page):
    named = re.findall(r"`(\w+)`", re.search(r"^Recipes: (.*)$", page.read_text(), re.MULTILINE).group(1))
    assert named
    by_name = {method.name: method for method in ALL}
    for name in named:
        assert by_name[name].page == f"docs/methods/{page.name}"


@each_page
def test_a_page_says_idea_equation_parts_needs_and_defaults(page):
    text = page.read_text()
    for heading in ("Idea", "Parts", "Needs", "Defaults"):
        assert re.search(rf"^## {heading}\n\n\S", text, re.MULTILINE), heading
    assert re.search(r"^## Equation\n\n    \S", text, re.MULTILINE)


@each_method
def test_a_page_names_the_parts_of_its_recipes(method):
    page = page_of(method)
    for term in method.objective.terms:
        kinds = [part.kind for part in (*term.advantage, *term.token_weights, *term.rollout_weights)]
        kinds += [term.target.kind]
        for kind in kinds:
            assert f"`{kind}" in page, kind
