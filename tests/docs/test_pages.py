"""Documentation that is made from the code is what the code says; links lead somewhere."""

import re
from pathlib import Path

import pytest
from scripts import script

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generator():
    return script("docs/generate.py")


def test_the_page_of_settings_is_what_the_configs_say():
    assert (ROOT / "docs" / "configuration.md").read_text() == generator().configuration(), (
        "python docs/generate.py"
    )


def test_the_page_of_metrics_is_what_the_schemas_say():
    assert (ROOT / "docs" / "metrics.md").read_text() == generator().metrics(), "python docs/generate.py"


def test_the_picture_of_the_rooms_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert generator().TREE in text
    assert generator().architecture(text) == text, "python docs/generate.py"


def test_the_picture_has_every_module_with_a_sentence():
    picture = generator().architecture("")
    for folder in generator().FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py" and path.parent != ROOT / "lightopd":
                assert re.search(rf"^  {path.stem} +\S", picture, re.MULTILINE), path


def test_the_table_of_methods_is_what_the_recipes_say():
    text = (ROOT / "docs" / "methods" / "README.md").read_text()
    assert generator().BEGIN in text
    assert generator().methods_page(text) == text, "python docs/generate.py"


def test_the_guide_to_the_methods_names_every_recipe_in_words_and_no_other():
    guide, _, _ = (ROOT / "docs" / "methods" / "README.md").read_text().partition("## All recipes")
    recipes = {path.stem for path in (ROOT / "pipelines" / "recipes" / "methods").glob("*.yaml")}
    named = set(re.findall(r"`([a-z0-9_]+)`", guide))
    assert recipes <= named, f"docs/methods/README.md: say when to take {', '.join(sorted(recipes - named))}"
    assert named - recipes <= {"precompute", "behavior_logprobs", "privacy", "overlap", "log_ratio_lost"}
    assert len(guide.splitlines()) <= 90


def test_what_the_pages_say_was_measured_is_what_the_results_say():
    for page, text in generator().method_pages().items():
        assert page.read_text() == text, f"{page.name}: python docs/generate.py"


def test_a_recipe_has_results_of_every_seed_or_its_page_says_that_it_has_none():
    runs = generator().runs_by_recipe()
    recipes = {path.stem for path in (ROOT / "pipelines" / "recipes" / "methods").glob("*.yaml")}
    assert set(runs) <= recipes
    for name, found in runs.items():
        for lines in found:
            seeds = {line["seed"] for line in lines if not line["is_tuning"]}
            assert seeds == set(range(5)), f"python benchmarks/study/methods.py --only {name}"
    pages = generator().method_pages().values()
    for name in recipes - set(runs):
        assert any(f"`{name}`" in text.rpartition("Not measured: ")[2] for text in pages), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("stage", ["sft", "rollout", "precompute", "train", "eval", "run"])
def test_every_stage_has_a_page_that_names_its_command(stage):
    assert f"lightopd {stage}" in (ROOT / "docs" / "stages" / f"{stage}.md").read_text()
