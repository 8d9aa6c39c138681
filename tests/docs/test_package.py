"""The package as it is built: folders, layers, light imports, sizes."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "lightopd": "lightopd",
    "lightopd.cli": "cli",
    "lightopd.pipelines": "pipelines",
    "lightopd.schemas": "schemas",
}
ROOMS = [
    "schemas.base",
    "schemas.lineage",
    "schemas.objectives",
    "schemas",
    "errors",
    "processes",
    "files",
    "ranks",
    "stopping",
    "under_way",
    "text_tables",
    "telling",
    "config",
    "lineage",
    "models",
    "rewards",
    "prompts",
    "cache",
    "kernels",
    "engines.base",
    "engines.stop_strings",
    "engines.hf",
    "engines.vllm",
    "engines",
    "objectives.base",
    "objectives.parts",
    "objectives",
    "objectives.preparation",
    "training.distributed",
    "training.weight_files",
    "training.privacy",
    "training.data",
    "training.student",
    "training.measures",
    "training.checkpoints",
    "training",
    "inspection",
    "pipelines",
    "pipelines.shared",
    "pipelines.workers",
    "pipelines.sampling",
    "pipelines.caches",
    "pipelines.maintenance",
    "pipelines.multi_round",
    "pipelines.stages",
    "pipelines.demos",
    "cli",
]
"""Each may import itself and what stands before it; `pipelines` alone is its `__init__`, a path or two."""
HEAVY = ("torch", "transformers", "vllm", "ray", "lightning", "reasoning_gym")

SOURCES = [path for folder in FOLDERS.values() for path in sorted((ROOT / folder).rglob("*.py"))]
TEST_FOLDERS = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}


def room_of(module: str) -> str:
    """The room of a module of ours: the longest name in `ROOMS` that it begins with."""
    name = module.removeprefix("lightopd.")
    if name.startswith("pipelines.") and name.count(".") == 1 and f"{name}" not in ROOMS:
        return "pipelines.stages"
    return max((room for room in ROOMS if f"{name}.".startswith(f"{room}.")), key=len)


def module_of(path: Path) -> str:
    package = next(name for name, folder in FOLDERS.items() if path.is_relative_to(ROOT / folder))
    parts = path.relative_to(ROOT / FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


MODULES = {module_of(path) for path in SOURCES} - {"lightopd"}


def names_of(node: ast.AST) -> set[str]:
    """Modules that a statement may import."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def imports_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    found = {name for node in nodes for name in names_of(node)}
    return {name for name in found if name == "lightopd" or name.startswith("lightopd.")}


def data_files(module: str, patterns: list[str]) -> set[Path]:
    top = max((name for name in FOLDERS if f"{module}.".startswith(f"{name}.")), key=len)
    folder = ROOT / FOLDERS[top] / module.removeprefix(top).lstrip(".").replace(".", "/")
    return {path for pattern in patterns for path in folder.glob(pattern)}


def test_the_package_list_names_every_folder_with_python_files_or_data():
    """A folder of data that is not named is installed with a warning that it will not be for long."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed, data = set(settings["packages"]), settings["package-data"]
    with_code = {module_of(path.parent / "__init__.py") for path in SOURCES}
    assert listed == with_code | set(data)
    files = {path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*") if path.is_file()}
    no_code = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert no_code == set().union(*(data_files(*each) for each in data.items()))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_between_all_rooms(path):
    module = module_of(path)
    if module == "lightopd":
        assert {name.rpartition(".")[0] for name in imports_of(path)} <= {
            "lightopd.inspection",
            "lightopd.inspection.opened",
        }
        return
    allowed = ROOMS[: ROOMS.index(room_of(module)) + 1]
    beyond = {name for name in imports_of(path) if name in MODULES and room_of(name) not in allowed}
    assert not beyond


@pytest.mark.parametrize("folder", sorted({path.parent for path in SOURCES} | TEST_FOLDERS), ids=str)
def test_no_folder_holds_more_than_ten_modules(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 10


def test_tests_lie_in_the_rooms_of_what_they_test():
    rooms = {module_of(path.parent / "__init__.py").removeprefix("lightopd.") for path in SOURCES}
    beside = {ROOT / "tests" / name for name in (".", "benchmarks", "docs", "fuzz", "study", "torture")}
    for folder in TEST_FOLDERS - beside:
        assert ".".join(folder.relative_to(ROOT / "tests").parts) in rooms


def test_the_command_and_the_schemas_import_nothing_heavy():
    code = (
        "import sys, lightopd.cli.main, lightopd.schemas.configs, lightopd.schemas.manifest\n"
        "import lightopd.schemas.run\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_stages_that_train_nothing_do_not_read_lightning():
    """Its import is a fifth of the time in which they start."""
    files = {module_of(path): path for path in SOURCES}
    todo, seen = [f"lightopd.pipelines.{stage}" for stage in ("rollout", "precompute", "rewrite")], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        names = {name for node in ast.parse(files[module].read_text()).body for name in names_of(node)}
        assert not any(name.partition(".")[0] == "lightning" for name in names), module
        todo += names & files.keys()
    assert len(seen) > 100


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import lightopd; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "['lightopd']"


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
