"""Hidden states to codes and back, and the head that makes log-probabilities of them.

The head lies in the cache once for all signals of a model, under the SHA-256 of its file.

N = response tokens, D = hidden size, V = vocabulary.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightopd.cache.buckets.mirrors import size_of, when_here
from lightopd.cache.manifests import head_path
from lightopd.cache.signals.channels import Channels, HiddenColumns
from lightopd.cache.store import Cache
from lightopd.errors import CacheError
from lightopd.files import file_sha256, write_atomically
from lightopd.models.head import Head
from lightopd.schemas.manifest import SIGNAL_MANIFEST, SignalManifest
from lightopd.schemas.signals.kinds import HiddenStates

MAX_CODE = 127
SMALLEST_SCALE = 2.0**-14
"""The least normal float16: a token whose standardised values are all below 127 of these is all zeros."""
AGAIN = "copy it again from where the cache was made, or score the signal again"


def write_head(cache: Path, head: Head) -> str:
    """Store a head in a cache, in its own number format; its SHA-256. Equal ones are one file.

    Raises:
        OutputError: no permission or no space.
    """
    tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
    # One key, since the order of several is not the same in every process.
    told = json.dumps({"softcap": head.softcap, "temperature": head.temperature}, sort_keys=True)
    content = save({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, {"head": told})
    found = hashlib.sha256(content).hexdigest()
    if not head_path(cache, found).exists():
        write_atomically(head_path(cache, found), content)
    return found


def read_head(cache: Path, described: HiddenStates, num_vocab: int) -> Head:
    """The head of a signal's hidden states, float32 on the CPU, checked against its manifest.

    Args:
        cache: folder of the cache.
        described: what the signal's manifest says.
        num_vocab: width of the student's output.

    Raises:
        CacheError: the file is missing, damaged, not the one that the manifest names, or of other sizes.
    """
    path = head_path(cache, described.head)
    if size_of(path) is None:
        raise CacheError(f"{path} is missing, the head of hidden states in this cache; {AGAIN}")
    if when_here(path, described.head, lambda: file_sha256(path)) != described.head:
        raise CacheError(f"{path} is not the head that {SIGNAL_MANIFEST} names; {AGAIN}")
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["head"])
            names = file.keys()
            weight_VD = file.get_tensor("weight").float()
            bias_V = file.get_tensor("bias").float() if "bias" in names else None
            head = Head(weight_VD, bias_V, told["softcap"], told["temperature"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CacheError(f"{path} does not hold a head ({error}); {AGAIN}") from None
    if head.weight_VD.shape != (num_vocab, described.size):
        raise CacheError(
            f"{path} has {tuple(head.weight_VD.shape)} weights; {num_vocab} tokens and hidden states of "
            f"{described.size} values need {(num_vocab, described.size)}; {AGAIN}"
        )
    if not bool(head.weight_VD.isfinite().all()):
        raise CacheError(f"{path} has weights that are NaN or infinite; {AGAIN}")
    return head


def head_of_signal(cache: Cache, name: str) -> Head:
    """The head of a loaded signal that keeps hidden states, float32 on the CPU.

    Raises:
        CacheError: there is no such signal, it keeps none, or its head is missing or damaged.
    """
    manifest = cache.manifest_of(name)
    if not isinstance(manifest, SignalManifest) or manifest.hidden is None:
        raise CacheError(
            f"signal {name} of {cache.path} keeps no hidden states; score it under another name: "
            f"lightopd precompute --keep hidden"
        )
    return read_head(cache.path, manifest.hidden, cache.manifest.vocabulary_size)


def quantise(hidden_ND: Tensor, mean_D: Tensor, std_D: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, D] and scales float32 [N], which are float16 values; NaN or infinity gives scale NaN.

    A token's scale maps its largest standardised value to 127.
    """
    standard_ND = (hidden_ND.float() - mean_D) / std_D
    largest_N = standard_ND.abs().amax(1)
    scales_N = (largest_N / MAX_CODE).clamp(min=SMALLEST_SCALE).half().float()
    scales_N = scales_N.masked_fill(~(largest_N.isfinite() & scales_N.isfinite()), torch.nan)
    codes_ND = (standard_ND / scales_N[:, None]).nan_to_num(0.0).round_().clamp_(-MAX_CODE, MAX_CODE)
    return codes_ND.to(torch.int8), scales_N


def dequantise(codes_ND: Tensor, scales_N: Tensor, mean_D: Tensor, std_D: Tensor) -> Tensor:
    """Hidden states float32 [N, D] from codes and scales, on their device."""
    return (codes_ND.float() * scales_N[:, None]).mul_(std_D).add_(mean_D)


def hidden_states(columns: HiddenColumns, device: torch.device) -> Tensor:
    """Stored hidden states as float32 [N, D]; the codes go to the device, and are widened there."""
    codes_ND = columns.codes_ND
    moved_ND = _moved(codes_ND if codes_ND.dtype == np.int8 else codes_ND.view(np.int16), device)
    if columns.scales_N is None or columns.channels is None:
        return moved_ND.view(torch.bfloat16).float()
    return dequantise(moved_ND, _moved(columns.scales_N, device), *on_device(columns.channels, device))


def on_device(channels: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, float32 [D]."""
    return _moved(channels.mean_D, device), _moved(channels.std_D, device)


def _moved(array: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def as_codes(hidden_ND: Tensor, channels: Channels | None) -> tuple[Tensor, Tensor | None]:
    """What is stored of hidden states: int8 codes and scales, or bfloat16 as int16 and None."""
    if channels is None:
        return hidden_ND.to(torch.bfloat16).view(torch.int16), None
    return quantise(hidden_ND, *on_device(channels, hidden_ND.device))
