"""Which model, which tokenizer, which SFT teacher: fingerprints, and the lineage file of a student."""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lightopd.errors import InputError, LineageError
from lightopd.files import streams_in, write_atomically
from lightopd.lineage.architecture import architecture, spelled_out
from lightopd.lineage.tensor_hashes import TensorHash, hash_tensors
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import (
    STUDENT_LINEAGE,
    ModelFingerprint,
    SftLineage,
    StudentLineage,
    TokenizerFingerprint,
)

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "README.md",
)
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
STUDENT_LINEAGE_VERSION = 1

# Where the adapter came from and who saved it; `inference_mode` is set by every save.
_NOT_ADAPTER = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Where a model's files lie on this machine."""

    path: Path
    commit: str | None
    """Commit of a hub repository; None for a plain folder."""


def model_folder(model: ModelConfig) -> ModelFolder:
    """The folder of a model; a hub repository is downloaded, or found in the local hub cache.

    Raises:
        InputError: no such folder, one with a FIFO, socket or device in it, a folder with a revision, or the
            repository can neither be reached nor found locally.
    """
    folder = Path(model.path).expanduser()
    for stream in streams_in(folder, *([model.adapter] if model.adapter else [])):
        raise InputError(stream)
    if folder.is_dir():
        if model.revision is not None:
            raise InputError(
                f"revision is {model.revision}, and {model.path} is a folder, which has none; leave it out"
            )
        return ModelFolder(folder, None)
    if not HUB_ID.fullmatch(model.path):
        raise InputError(f"no model folder {model.path}; give an existing folder or a hub repository id")
    from huggingface_hub import snapshot_download

    files = [*HUB_FILES, *(["*.py"] if model.trust_remote_code else [])]
    try:
        snapshot = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{model.path} is no folder here and cannot be fetched as a hub repository ({reason}); "
            "give an existing folder, or download the model on a machine with access and copy it here"
        ) from error
    return ModelFolder(snapshot, snapshot.name)


def fingerprint_model(model: ModelConfig) -> ModelFingerprint:
    """Fingerprint of a model from its files: weights, architecture config and adapter.

    A renamed, moved or re-sharded folder keeps its `identity`; one changed weight does not. A folder
    that transformers 5 saves again in the same number format keeps it too where the architecture
    keys that the save adds are ones that follow from the others (Llama, Qwen, Phi, Gemma and their like).

    Raises:
        InputError: no such folder, no safetensors weights, a damaged file, or no readable config.
    """
    folder = model_folder(model)
    weights = _hash_of(hash_tensors(weight_files(folder.path)))
    settings = read_json(folder.path / "config.json")
    config, before = canonical_hash(architecture(settings)), canonical_hash(spelled_out(settings))
    adapter = None if model.adapter is None else _fingerprint_adapter(model.adapter)
    identity, earlier = (
        canonical_hash({"weights": weights, "config": one, "adapter": adapter}) for one in (config, before)
    )
    return ModelFingerprint(
        identity=identity,
        earlier=None if earlier == identity else earlier,
        weights=weights,
        config=config,
        adapter=adapter,
        source=model.path,
        commit=folder.commit,
    )


def fingerprint_tokenizer(tokenizer: Any, stop_ids: Iterable[int]) -> TokenizerFingerprint:
    """Fingerprint of a transformers tokenizer; `stop_ids` are all ids that end a response."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "pad", "unk")}
    special_ids = {role: [] if token is None else [int(token)] for role, token in roles.items()}
    special_ids["eos"] = sorted({int(token) for token in stop_ids})
    template = tokenizer.chat_template
    return TokenizerFingerprint(
        vocabulary=canonical_hash(vocabulary),
        size=len(vocabulary),
        special_ids=special_ids,
        template=None if template is None else canonical_hash(template),
    )


def read_student_lineage(model: ModelConfig, fingerprint: ModelFingerprint) -> StudentLineage | None:
    """The lineage file of a student, or None where there is none.

    It lies in the model folder, or in the adapter folder where the student is an adapter.

    Args:
        fingerprint: of the same model, as `fingerprint_model` gives it.

    Raises:
        LineageError: the file speaks of other weights than those beside it.
        InputError: the file is broken, or of a newer version.
    """
    folder = model_folder(model).path if model.adapter is None else model.adapter
    path = folder / STUDENT_LINEAGE
    if not path.exists():
        return None
    plain = read_json(path)
    version = plain.get("schema_version")
    if isinstance(version, int) and version > STUDENT_LINEAGE_VERSION:
        raise InputError(
            f"{path} has schema version {version}, this lightopd reads up to {STUDENT_LINEAGE_VERSION}; "
            "install a newer lightopd"
        )
    try:
        lineage = StudentLineage.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is broken at {where or 'the top'}: {first['msg']}; restore it, or delete it "
            "and declare the teacher with --sft-teacher"
        ) from error
    if not fingerprint.is_same_as(lineage.student):
        raise LineageError(
            f"{path} is about other weights ({lineage.student.identity[:12]}) than those beside it "
            f"({fingerprint.identity[:12]}); restore the folder, or delete the file and declare the "
            "teacher with --sft-teacher"
        )
    return lineage


def write_student_lineage(folder: Path, lineage: StudentLineage) -> Path:
    """Write the lineage file beside a student's weights; returns its path.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = folder / STUDENT_LINEAGE
    write_atomically(path, (lineage.model_dump_json(indent=2) + "\n").encode())
    return path


def declared_teacher(declared: str) -> SftLineage:
    """The lineage of a student made elsewhere, whose SFT teacher the user names.

    A folder is fingerprinted, so that the scoring teacher is compared by content. Anything else is a
    name, such as a hub repository id; it is not fetched, and is compared as text with the path or
    repository that the scoring teacher is read from. `none` claims no teacher.

    Raises:
        InputError: it is written as a path and there is no such folder, or the folder holds no model.
    """
    if declared == "none":
        return SftLineage(proof="none")
    written_as_path = declared.startswith((".", "/", "~")) or declared.endswith("/")
    if written_as_path or Path(declared).is_dir():
        try:
            model = ModelConfig(path=declared)
        except ValidationError as error:
            raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return SftLineage(proof="declared", teacher=fingerprint_model(model))
    return SftLineage(proof="declared", name=declared)


def weight_files(folder: Path) -> list[Path]:
    """The files transformers would load, and no others that lie beside them."""
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} is an adapter; give its base model as the path and this folder as `adapter`"
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index} has no weight_map; copy or download the model again")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if not file.exists():
                raise InputError(f"{file} is missing, {index.name} names it; copy or download it")
        return files
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{folder} has pickled weights only; load it once with transformers and save it again with "
            "save_pretrained, which writes safetensors"
        )
    raise InputError(f"{folder} has no model.safetensors; give the folder of a Hugging Face model")


def _fingerprint_adapter(folder: Path) -> str:
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise InputError(
            f"{folder} has no {file.name}; give the folder of a PEFT adapter saved as safetensors"
        )
    config = read_json(folder / "adapter_config.json")
    kept = {key: value for key, value in config.items() if key not in _NOT_ADAPTER and value is not None}
    # PEFT keeps this list as a set: its order changes from save to save.
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return canonical_hash({"weights": _hash_of(hash_tensors([file])), "config": kept})


def _hash_of(tensors: list[TensorHash]) -> str:
    return canonical_hash([list(tensor) for tensor in tensors])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model folder.

    Raises:
        InputError: the file is missing, unreadable, no JSON or no object.
    """
    try:
        # Python's reader takes Infinity and NaN, which a canonical hash cannot hold as numbers.
        text = path.read_text("utf-8")
        plain = json.loads(text, parse_constant=str)
        if HALF_CHARACTER.search(text):  # written as an escape, half a pair is JSON and no text
            json.dumps(plain, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise InputError(f"no {path}; give the folder of a complete Hugging Face model") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not valid JSON ({reason}); copy or download it again") from error
    if not isinstance(plain, dict):
        raise InputError(
            f"{path} holds a {type(plain).__name__}, not a JSON object; copy or download it again"
        )
    return plain
