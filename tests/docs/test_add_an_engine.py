"""docs/add_an_engine.md is followed to the letter, on a copy of the source tree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "add_an_engine.md").read_text(encoding="utf-8")

CONTRACT = """
import importlib.machinery, pathlib, sys
import pytest
sys.meta_path.insert(0, importlib.machinery.PathFinder)  # before what finds an installed lightopd
sys.path.insert(0, str(pathlib.Path.cwd()))
sys.exit(pytest.main(["-q", "-k", "unigram", "tests/engines/test_contract.py"]))
"""


def blocks(language):
    """(name, content) of the guide's fenced blocks in a language."""
    return re.findall(rf"^```{language} ?(\S*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_an_engine_of_its_own_takes_four_files_and_passes_the_contract(tmp_path):
    tree = tmp_path / "tree"
    for folder in ("schemas", "lightopd", "tests/support"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "lightopd" / "schemas").symlink_to(tree / "schemas")
    for file in ("pyproject.toml", "tests/engines/test_contract.py"):
        (tree / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    edits, modules = blocks("diff"), blocks("python")
    assert len(edits) + len(modules) == 4
    for _, diff in edits:
        subprocess.run(["git", "apply", "-"], input=diff, cwd=tree, text=True, check=True)
    for path, code in modules:
        (tree / path).write_text(code, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-c", CONTRACT], cwd=tree, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert re.search(r"(2\d|3\d) passed", found.stdout), found.stdout[-300:]
