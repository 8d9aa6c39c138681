"""The package as it is built: folders, layers, light imports, sizes."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lightopd": "lightopd",
    "lightopd.cli": "cli",
    "lightopd.pipelines": "pipelines",
    "lightopd.schemas": "schemas",
}
LAYERS = ["lightopd.schemas", "lightopd", "lightopd.pipelines", "lightopd.cli"]
"""Each may import itself and what stands before it."""
HEAVY = ("torch", "transformers", "vllm", "ray", "lightning", "reasoning_gym")

SOURCES = [path for folder in FOLDERS.values() for path in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(module: str) -> str:
    return max((layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")), key=len)


def module_of(path: Path) -> str:
    package = next(name for name, folder in FOLDERS.items() if path.is_relative_to(ROOT / folder))
    parts = path.relative_to(ROOT / FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name == "lightopd" or name.startswith("lightopd.")}


def test_the_package_list_names_every_folder_with_python_files():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {module_of(path.parent / "__init__.py") for path in SOURCES}
    assert listed == on_disk


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    allowed = LAYERS[: LAYERS.index(layer_of(module_of(path))) + 1]
    beyond = {
        name for name in imports_of(path) if name != "lightopd.__version__" and layer_of(name) not in allowed
    }
    assert not beyond


def test_the_command_and_the_schemas_import_nothing_heavy():
    code = (
        "import sys, lightopd.cli.main, lightopd.schemas.configs, lightopd.schemas.manifest\n"
        "import lightopd.schemas.run\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_outgrows_400_lines_and_no_function_60(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
