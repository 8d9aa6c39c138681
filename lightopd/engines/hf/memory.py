"""Turns a lack of memory into an error that says which setting to change."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from lightopd.errors import EngineError

WIDTHS, INNER_WIDTHS = 12, 4
"""Vectors that a token has alive in a layer without gradients: of the hidden size (the residual, its norm,
queries, keys, values and what attention makes of them, some twice), and of the layer's inner size."""
HEAD_BYTES = 3 * (512 << 20)
"""What the output layer takes beside: products, one copy, and scores of a batch."""


def free_bytes(device: torch.device) -> int | None:
    """What a GPU has free, with what PyTorch holds of it and does not use; None for other devices."""
    if device.type != "cuda":
        return None
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused)


def fitting_tokens(model: PreTrainedModel, free: int) -> int:
    """Tokens of a forward pass without gradients that `free` bytes hold, at least 1."""
    config = model.config.get_text_config(decoder=True)
    hidden: int = config.hidden_size
    inner: int = getattr(config, "intermediate_size", None) or 4 * hidden
    per_token = (WIDTHS * hidden + INNER_WIDTHS * inner) * model.dtype.itemsize
    return max(1, int((free - HEAD_BYTES) // per_token))


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
