"""docs/add_an_objective.md is followed to the letter, on a copy of the source tree."""

import os
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

PATHS_FIRST = """
import importlib.machinery, sys
sys.meta_path.insert(0, importlib.machinery.PathFinder)  # before what finds an installed lightopd
"""


def blocks(language: str) -> list[tuple[str, str]]:
    """(name, content) of the guide's fenced blocks in a language."""
    return re.findall(rf"^```{language} ?(\S*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source as a repository would have it, importable as `lightopd` from tmp_path/packages."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("schemas", "lightopd"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=ignored)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "lightopd").symlink_to(tmp_path / "tree" / "lightopd")
    (tmp_path / "tree" / "lightopd" / "schemas").symlink_to(tmp_path / "tree" / "schemas")
    return tmp_path / "tree"


def run(tree: Path, code: str) -> str:
    search = os.pathsep.join(map(str, [tree.parent / "packages", ROOT / "tests" / "support" / "objectives"]))
    environment = {**os.environ, "PYTHONPATH": search}
    found = subprocess.run(
        [sys.executable, "-c", PATHS_FIRST + code],
        env=environment,
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_part_of_its_own_takes_three_files_and_passes_its_test(tree):
    diffs = [content for _, content in blocks("diff")]
    assert len(diffs) == 3
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], input=diff, cwd=tree, text=True, check=True)
    ((_, test),) = [block for block in blocks("python") if block[0] == "test"]
    where = "import lightopd.objectives.parts.targets as t; print(t.__file__)"
    out = run(tree, f"{test}\ntest_the_absolute_gap_is_its_equation()\n{where}")
    assert Path(out.strip()).resolve().is_relative_to(tree.resolve())


def test_a_function_of_ones_own_is_a_target_with_weights(tmp_path, monkeypatch):
    ((name, function),) = [block for block in blocks("python") if block[0] != "test"]
    (tmp_path / name).write_text(function)
    monkeypatch.syspath_prepend(tmp_path)
    ((_, recipe),) = blocks("yaml")
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
