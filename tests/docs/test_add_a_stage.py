"""docs/add_a_stage.md is followed to the letter, on a copy of the source tree."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lightopd.cache.index import query

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "add_a_stage.md").read_text(encoding="utf-8")

COMMAND = """
import importlib.machinery, pathlib, sys
sys.meta_path.insert(0, importlib.machinery.PathFinder)  # before what finds an installed lightopd
sys.path.insert(0, str(pathlib.Path.cwd()))
from lightopd.cli.main import main
main()
"""


def blocks(language):
    """(name, content) of the guide's fenced blocks in a language."""
    return re.findall(rf"^```{language} ?(\S*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_a_stage_of_its_own_takes_seven_files_and_runs_from_the_command_line(world, tmp_path):
    tree = tmp_path / "tree"
    for folder in ("schemas", "lightopd", "pipelines", "cli"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("schemas", "pipelines", "cli"):
        (tree / "lightopd" / folder).symlink_to(tree / folder)
    edits, modules = blocks("diff"), blocks("python")
    assert len(edits) + len(modules) + len(("its page", "the README")) == 7
    for _, diff in edits:
        subprocess.run(["git", "apply", "--recount", "-"], input=diff, cwd=tree, text=True, check=True)
    for path, code in modules:
        (tree / path).write_text(code, encoding="utf-8")

    def call(*arguments):
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        return found.stdout

    assert "Folder of `lengths.json`" in call("config", "show", "lengths")
    call("lengths", "--cache", world.cache, "--out", tmp_path / "out")
    wanted = query(world.cache, "select avg(len(response_ids)) as t from rollouts group by prompt_id")
    found = json.loads((tmp_path / "out" / "lengths.json").read_text())
    assert sorted(found["tokens"]) == sorted(wanted.to_pydict()["t"])
    assert (tmp_path / "out" / "lengths.report.json").is_file()
