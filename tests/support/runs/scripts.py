"""Scripts of the project that are no package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def script(path: str) -> ModuleType:
    """A script of the project, loaded anew; `path` from the project's folder."""
    place = ROOT / path
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
