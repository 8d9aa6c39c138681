"""Turns a lack of memory into an error that says which setting to change."""

import contextlib
from collections.abc import Iterator

import torch

from lightopd.errors import EngineError


@contextlib.contextmanager
def memory_advice(doing: str, setting: str, value: int) -> Iterator[None]:
    """Name the setting that was too large when the block runs out of memory.

    Args:
        doing: what the block does, as in "not enough memory to <doing>".
        setting: name of the setting as a user writes it.
        value: its value.

    Raises:
        EngineError: the device's or the machine's memory was not enough.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch reports a failed allocation as a plain RuntimeError.
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"not enough memory to {doing} ({reason}); set {setting}, now {value}, to {max(1, value // 2)} "
            f"or less"
        ) from error
