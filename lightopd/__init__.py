"""Offline on-policy distillation from a token-exact, lineage-checked cache."""

from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lightopd.inspection.opened import open_cache as open_cache

_CLONE = Path(__file__).parents[1]
if (
    _CLONE / "pyproject.toml"
).is_file():  # Python started in a clone finds this folder before what is installed
    __path__.append(str(_CLONE))

__version__ = "0.1.0"
__all__ = ["__version__", "open_cache"]


def __getattr__(name: str) -> object:
    """`lightopd.open_cache` is imported when it is first asked for, so that `import lightopd` stays light."""
    if name == "open_cache":
        from lightopd.inspection.opened import open_cache

        return open_cache
    raise AttributeError(f"module 'lightopd' has no attribute {name!r}")
