"""Loads a tokenizer, and proves that it reads text as its own files say."""

import logging
from pathlib import Path
from typing import Any

from lightopd.errors import InputError
from lightopd.lineage.fingerprint import ModelFolder, model_folder
from lightopd.schemas.configs import ModelConfig

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
PROBE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  two spaces,\ttab\nand\r\nnew lines  \n\n\n    four",
    "na\u00efve \u00c5ngstr\u00f6m \u4f60\u597d \U0001f469\u200d\U0001f680 \u0639\u0631\u0628\u064a",
    "x = {'a': [1, 2.50], \"b\": None}  # 3*(4-5)/6",
    "I'll, WE'VE; don\u2019t 1234567 e\u0301 \ufb01 \u2581 \u00a0 HTTPS://a_b-c.D/?q=\u03c0\u2248\u221e\u200b",
)
"""Spaces, line ends, digits, contractions, scripts, combining marks and code: tokenizers differ in these."""


def load_tokenizer(model: ModelConfig) -> Any:
    """The transformers tokenizer of a model, which reads and writes text as its `tokenizer.json` does.

    transformers may choose a class that builds another tokenizer than that of the file (byte-level files
    under `LlamaTokenizerFast` lose their spaces). A hub repository is loaded by its id: transformers
    knows exceptions by id. A folder is then loaded as its `tokenizer.json` says.

    Raises:
        InputError: no such folder, no tokenizer in it that can be read, or one that reads a probe text
            otherwise than its own file.
    """
    folder = model_folder(model)
    if not any((folder.path / name).exists() for name in TOKENIZER_FILES):
        raise InputError(
            f"{folder.path} has no tokenizer.json; copy the tokenizer's files beside the weights"
        )
    tokenizer = _read(model, folder, "AutoTokenizer")
    difference = _difference(tokenizer, folder.path)
    if difference and folder.commit is None:
        log.info("%s: read as its tokenizer.json says; %s", folder.path, difference)
        tokenizer = _read(model, folder, "PreTrainedTokenizerFast")
        difference = _difference(tokenizer, folder.path)
    if difference:
        raise InputError(
            f"the tokenizer that transformers loads for {model.path} is not the one in its tokenizer.json: "
            f"{difference}; correct tokenizer_class in its tokenizer_config.json"
            + ("" if folder.commit is None else ", in a folder of your own")
        )
    return tokenizer


def _read(model: ModelConfig, folder: ModelFolder, name: str) -> Any:
    import transformers

    source = str(folder.path) if folder.commit is None else model.path
    try:
        loaded = getattr(transformers, name).from_pretrained(
            source,
            revision=folder.commit,
            trust_remote_code=model.trust_remote_code,
            local_files_only=True,
        )
        for role in ("bos", "eos", "pad", "unk"):  # a broken special token is found when it is asked for
            getattr(loaded, f"{role}_token_id")
        return loaded
    except Exception as error:  # the libraries raise what a damaged file makes them raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the tokenizer in {folder.path} cannot be loaded ({reason}); copy its files again from where "
            "the model was made"
        ) from error


def _difference(tokenizer: Any, folder: Path) -> str | None:
    """Where a tokenizer and the folder's tokenizer.json part; None where they agree or there is no file."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        own = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file} cannot be read ({reason}); restore it") from error
    own.no_truncation()
    own.no_padding()
    vocabulary = tokenizer.get_vocab()
    for token, index in own.get_vocab(with_added_tokens=True).items():
        if vocabulary.get(token) != index:
            return f"{token!r} is id {vocabulary.get(token)}, the file has {index}"
    special = " ".join(token.content for token in own.get_added_tokens_decoder().values())[:2000]
    for text in (*PROBE_TEXTS, special):
        try:
            ids = own.encode(text, add_special_tokens=False).ids
            found = list(tokenizer.encode(text, add_special_tokens=False))
            written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
            return f"it fails on {text[:24]!r} ({' '.join(str(error).split())[:100]})"
        if found != ids:
            return f"it reads {text[:24]!r} as {_few(found)}, the file as {_few(ids)}"
        if written != own.decode(ids, skip_special_tokens=False):
            return f"it writes the ids of {text[:24]!r} as {written[:24]!r}"
    return None


def _few(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:6]))}{', ...' if len(ids) > 6 else ''}]"
