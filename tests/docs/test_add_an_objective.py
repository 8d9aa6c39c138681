"""docs/add_an_objective.md is followed to the letter, on a copy of the source tree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from objective_cases import evaluate, make_world, objective

from lightopd.errors import ConfigError

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "add_an_objective.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """(name, content) of the guide's fenced blocks in a language."""
    return re.findall(rf"^```{language} ?(\S*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


IN_THE_TREE = """
import importlib.machinery, pathlib, runpy, sys
sys.meta_path.insert(0, importlib.machinery.PathFinder)  # before what finds an installed lightopd
sys.path[:0] = [str(pathlib.Path.cwd()), str(pathlib.Path.cwd() / "tests/support/objectives")]
"""
FOLDERS = ("schemas", "lightopd", "pipelines", "cli")
TESTED = ("tests/objectives", "tests/support/objectives", "tests/docs")
GENERATE = "runpy.run_path('docs/generate.py', run_name='__main__')"
TESTS = """
import pytest
files = [f"tests/objectives/test_{name}.py" for name in ("recipes", "references")]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "absolute_gap", *files]))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source as a repository has it, importable as `lightopd` from its root."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for folder in (*FOLDERS, "docs", "benchmarks/study", *TESTED):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for folder in ("schemas", "pipelines"):
        (tmp_path / "lightopd" / folder).symlink_to(tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".gitignore").write_text("__pycache__\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    return tmp_path


def git(tree: Path, *arguments: str, text: str | None = None) -> str:
    found = subprocess.run(
        ["git", *arguments], input=text, cwd=tree, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def changed(tree: Path) -> set[str]:
    """Files that differ from what was there at the last call."""
    names = {line[3:] for line in git(tree, "status", "--porcelain", "-uall").splitlines() if line[1] != " "}
    git(tree, "add", "-A")
    return names


def run(tree: Path, code: str) -> str:
    command = [sys.executable, "-c", IN_THE_TREE + code]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


def apply_part(tree: Path) -> str:
    """Do what the guide says for a part; its test."""
    for _, diff in blocks("diff"):
        git(tree, "apply", "-", text=diff)
    ((_, test),) = [block for block in blocks("python") if block[0] == "test"]
    return test


def test_a_part_of_its_own_takes_three_files_and_one_command(tree):
    test = apply_part(tree)
    assert len(changed(tree)) == 3
    run(tree, f"{test}\ntest_the_absolute_gap_is_its_equation()\n{GENERATE}")
    assert changed(tree) == {"docs/configuration.md"}


def test_a_recipe_that_ships_takes_three_files_and_one_command(tree):
    apply_part(tree)
    run(tree, GENERATE)
    changed(tree)
    for path, content in (*blocks("yaml"), *blocks("markdown")):
        if "/" in path:
            (tree / path).write_text(content)
    ((_, reference),) = [block for block in blocks("python") if block[0] == "reference"]
    with (tree / "tests/support/objectives/objective_references.py").open("a") as file:
        file.write(reference)
    assert len(changed(tree)) == 3
    run(tree, GENERATE)
    assert changed(tree) == {"docs/methods/README.md", "docs/methods/absolute_gap.md"}
    assert "Not measured: `absolute_gap`." in (tree / "docs/methods/absolute_gap.md").read_text()
    run(tree, TESTS)


def test_a_function_of_ones_own_is_a_target_with_weights(tmp_path, monkeypatch):
    ((name, function),) = [block for block in blocks("python") if block[0].endswith(".py")]
    (tmp_path / name).write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    ((_, recipe),) = [block for block in blocks("yaml") if "/" not in block[0]]
    value, gradient_NV, _ = evaluate(objective(**yaml.safe_load(recipe)["objective"]), make_world())
    assert value > 0
    assert gradient_NV.abs().max() > 0.01


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(batch, student, options): ...", "cannot be loaded"),
        ("def loss(batch, student, options): return 1.0", r"must return a tensor .*\(32,\).* found float"),
        ("def loss(batch, student, options): return student.logprobs_N.sum()", r"found \(\)"),
    ],
)
def test_a_function_that_is_none_or_returns_something_else_is_refused(body, message, tmp_path, monkeypatch):
    name = f"own_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        evaluate(objective(target={"kind": "custom", "import_path": f"{name}:loss"}), make_world())
