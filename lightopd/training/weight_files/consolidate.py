"""One plain Hugging Face folder made of weights that are stored in shares.

Memory holds one file and one decoder layer at a time. The names are those that transformers itself saves: a
layer's fused experts, for one, are stored apart. Averaged weights, where the checkpoint has them, go before
its own.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lightopd.files import json_bytes, write_atomically
from lightopd.models.load import outline
from lightopd.training.weight_files.names import keep_stored_names
from lightopd.training.weight_files.tensor_shards import AVERAGE, MODEL, StoredSet, has_set

LAYER = re.compile(r".*?\.\d+\.")
"""What the names of one decoder layer's tensors begin with."""
LARGEST_FILE = "5GB"
"""Ten times smaller than what transformers writes, as it is how much of a model is held."""


def write_whole(
    checkpoint: Path, folder: Path, *, trust_remote_code: bool, stored: Collection[str] = ()
) -> None:
    """Write the weights of a checkpoint into a folder, with an index where they take several files.

    Args:
        checkpoint: its weights are stored in shares.
        folder: exists and has no weights.
        stored: names of the tensors where training began, which are kept.
        trust_remote_code: whether the model's own code may be run to learn the names.

    Raises:
        OSError: no space or no permission.
        InputError: the checkpoint is damaged.
    """
    model = outline(checkpoint, trust_remote_code=trust_remote_code)
    keep_stored_names(model, stored)
    weights = _Weights(checkpoint, model)
    outlines = {
        name: tensor.new_empty(tensor.shape)  # a part of a fused tensor counts with its own size
        for layer in weights.layers()
        for name, tensor in weights.converted(layer, StoredSet.outline)
    }
    divided = split_torch_state_dict_into_shards(
        outlines, filename_pattern="model{suffix}.safetensors", max_shard_size=LARGEST_FILE
    )
    left, found = dict(divided.filename_to_tensors), dict[str, Tensor]()
    for layer in weights.layers():
        found |= weights.converted(layer, StoredSet.whole)
        for file in [file for file, names in left.items() if found.keys() >= {*names}]:
            tensors = {name: found.pop(name).contiguous() for name in left.pop(file)}
            save_file(tensors, folder / file, metadata={"format": "pt"})
    assert not left
    if divided.is_sharded:
        total = {"total_parameters": model.num_parameters(), **divided.metadata}
        index = {"metadata": total, "weight_map": divided.tensor_to_filename}
        write_atomically(folder / SAFE_WEIGHTS_INDEX_NAME, json_bytes(index))


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
