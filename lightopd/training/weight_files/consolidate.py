"""One plain Hugging Face folder made of weights that are stored in shares.

Each file is written tensor by tensor, so that memory holds one decoder layer at a time. The names are those
that transformers itself saves: a layer's fused experts, for one, are stored apart. Averaged weights, where
the checkpoint has them, go before its own.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lightopd.files import json_bytes, write_atomically
from lightopd.models.load import outline
from lightopd.training.weight_files.tensor_files import TensorLayout, TensorWriter
from lightopd.training.weight_files.tensor_shards import AVERAGE, MODEL, StoredSet, has_set

LAYER = re.compile(r".*?\.\d+\.")
"""What the names of one decoder layer's tensors begin with."""
LARGEST_FILE = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default


def write_whole(checkpoint: Path, folder: Path, *, trust_remote_code: bool) -> None:
    """Write the weights of a checkpoint into a folder, with an index where they take several files.

    Args:
        checkpoint: its weights are stored in shares.
        folder: exists and has no weights.
        trust_remote_code: whether the model's own code may be run to learn the names.

    Raises:
        OSError: no space or no permission.
        InputError: the checkpoint is damaged.
    """
    model = outline(checkpoint, trust_remote_code=trust_remote_code)
    weights = _Weights(checkpoint, model)
    layouts = {
        name: TensorLayout(tensor.dtype, tuple(tensor.shape))
        for layer in weights.layers()
        for name, tensor in weights.converted(layer, StoredSet.outline)
    }
    files = _divided(layouts)
    with ExitStack() as stack:
        writers: dict[str, TensorWriter] = {}
        for file, names in files.items():
            own = {name: layouts[name] for name in names}
            writer = stack.enter_context(TensorWriter(folder / file, own, {"format": "pt"}))
            writers |= dict.fromkeys(names, writer)
        for layer in weights.layers():
            for name, tensor in weights.converted(layer, StoredSet.whole):
                writers[name].write(name, tensor)
    if len(files) > 1:
        _write_index(folder, files, layouts, model.num_parameters())


class _Weights:
    """Weights of a checkpoint, averaged ones before its own, under the names that transformers saves."""

    def __init__(self, checkpoint: Path, model: PreTrainedModel) -> None:
        self._model = model
        own = StoredSet(checkpoint, MODEL)
        self._sets = dict.fromkeys(own, own)
        if has_set(checkpoint, AVERAGE):
            average = StoredSet(checkpoint, AVERAGE)
            self._sets |= dict.fromkeys(average, average)
        # A tied weight is stored once, under any of its names; transformers saves the one it ties others to.
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        self._renamed = {name: tied.get(name, name) for name in self._sets}

    def layers(self) -> list[list[str]]:
        """Names of the tensors of each layer, and of what lies around them."""
        groups: dict[str, list[str]] = {}
        for name in self._sets:
            found = LAYER.match(name)
            groups.setdefault(found.group() if found else "", []).append(name)
        return list(groups.values())

    def converted(
        self, layer: Sequence[str], read: Callable[[StoredSet, str], Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Tensors of a layer as they are saved."""
        tensors = {self._renamed[name]: read(self._sets[name], name) for name in layer}
        saved: dict[str, Tensor] = revert_weight_conversion(self._model, tensors)
        return saved.items()


def _divided(layouts: dict[str, TensorLayout]) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    empty = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in layouts.items()}
    divided = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=LARGEST_FILE
    )
    return dict(divided.filename_to_tensors)


def _write_index(
    folder: Path, files: dict[str, list[str]], layouts: dict[str, TensorLayout], num_parameters: int
) -> None:
    total = sum(layout.size_bytes for layout in layouts.values())
    index = {
        "metadata": {"total_parameters": num_parameters, "total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    write_atomically(folder / SAFE_WEIGHTS_INDEX_NAME, json_bytes(index))
