"""The installed wheel as a user has it: what it holds, how fast help answers, that every recipe parses."""

import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

HELP_LIMIT_S = 0.5
HEAVY = ("torch", "transformers", "vllm", "ray", "lightning")


def main(bin_folder: Path, dist: Path) -> None:
    """Check what was built into `dist` and installed beside `bin_folder`."""
    wheel = next(dist.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    top_level = next(name for name in names if name.endswith("top_level.txt"))
    assert zipfile.ZipFile(wheel).read(top_level).decode().split() == ["lightopd"], top_level
    assert any(name.endswith(".tar.gz") for name in map(str, dist.iterdir())), "no sdist"
    seconds = [_help_seconds(bin_folder) for _ in range(5)]
    assert statistics.median(seconds) < HELP_LIMIT_S, f"lightopd --help took {seconds}"
    _run(bin_folder / "python", "-c", _NO_HEAVY_IMPORTS)
    _run(bin_folder / "python", "-c", _ALL_RECIPES_PARSE)
    print(f"wheel is right: {len(names)} files, help in {statistics.median(seconds):.2f} s")


def _help_seconds(bin_folder: Path) -> float:
    started_s = time.monotonic()
    _run(bin_folder / "lightopd", "--help")
    return time.monotonic() - started_s


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, cwd="/", stdout=subprocess.DEVNULL)


_NO_HEAVY_IMPORTS = f"""
import sys
import lightopd.cli.main, lightopd.schemas.configs, lightopd.schemas.manifest
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, f"imported at start: {{loaded}}"
"""

_ALL_RECIPES_PARSE = """
from lightopd.config import is_run_file, load_run, load_stage, read_yaml
from lightopd.pipelines import RECIPES
recipes = sorted(path for path in RECIPES.rglob("*.yaml") if RECIPES / "study" not in path.parents)
assert recipes, RECIPES
assert list((RECIPES / "study" / "regimes").glob("*.yaml")), "the study's arms are missing"
for path in recipes:
    recipe = read_yaml(str(path))
    if is_run_file(recipe):
        given = {"out": "x", "teacher": "t", "student": "s", "prompts": recipe.get("prompts", "p.jsonl")}
        load_run([str(path)], [], given)
    else:
        load_stage("train", [str(path)], [], {"cache": "x", "student": "x", "out": "y"})
"""

if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
