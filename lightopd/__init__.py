"""Offline on-policy distillation from a token-exact, lineage-checked cache."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lightopd.inspection.opened import open_cache as open_cache

__version__ = "0.1.0"
__all__ = ["__version__", "open_cache"]


def __getattr__(name: str) -> object:
    """`lightopd.open_cache` is imported when it is first asked for, so that `import lightopd` stays light."""
    if name == "open_cache":
        from lightopd.inspection.opened import open_cache

        return open_cache
    raise AttributeError(f"module 'lightopd' has no attribute {name!r}")
