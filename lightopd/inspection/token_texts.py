"""Token ids as text for people, by the tokenizer that made them; byte pieces and control characters shown.

Only the `tokenizers` library is used, whose import takes a tenth of a second where transformers takes
seconds. A tokenizer counts as the cache's own when its token-to-id map is the one in the manifest.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightopd.cache.store import Cache
from lightopd.errors import InputError, LineageError
from lightopd.schemas.base import canonical_hash

FILE = "tokenizer.json"
_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


@dataclass(slots=True)
class TokenTexts:
    """What the ids of a cache stand for; without a tokenizer each id is written as `#17`."""

    source: Path | None
    """Folder of the tokenizer; None when none was found."""
    missing: str | None = None
    """Where it was looked for, in a sentence; None when it was found."""
    _tokenizer: Any = None
    _kind: str = ""
    _known: dict[int, str] = field(default_factory=dict)

    def token(self, token_id: int) -> str:
        """One token's text; bytes that are no text by themselves as `\\xE2`, an unknown id as `#17`."""
        if token_id not in self._known:
            self._known[token_id] = _shown(self.piece(token_id))
        return self._known[token_id]

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        text: str | None = self._tokenizer.id_to_token(token_id) if self._tokenizer else None
        if text is None:
            return f"#{token_id}".encode()
        if found := _BYTE_TOKEN.match(text):
            return bytes([int(found[1], 16)])
        if self._kind == "bytes" and all(letter in _BYTES for letter in text):
            return bytes(_BYTES[letter] for letter in text)
        return (text.replace("\u2581", " ") if self._kind == "spaces" else text).encode("utf-8", "replace")

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of a sequence, special tokens included."""
        ids = [int(token_id) for token_id in token_ids]
        if self._tokenizer is None:
            return " ".join(f"#{token_id}" for token_id in ids)
        if self._kind == "whole":
            text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
            return text
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")


def find_token_texts(cache: Cache, tokenizer: Path | None = None, others: Sequence[Path] = ()) -> TokenTexts:
    """The tokenizer of a cache: the one given, else the sampler's, a scorer's, or one of a run beside it.

    Args:
        cache: opened, complete or not.
        tokenizer: folder of the tokenizer, held to be the cache's own.
        others: further folders to look in, such as a run's student.

    Raises:
        InputError: the folder given has no tokenizer.json that can be read.
        LineageError: its token-to-id map is not the one that the cache was made with.
    """
    wanted = cache.manifest.tokenizer.vocabulary if cache.manifest.tokenizer else None
    if tokenizer is not None:
        found = _read(tokenizer)
        if wanted is not None and _vocabulary(found) != wanted:
            raise LineageError(
                f"{tokenizer} has another token-to-id map than {cache.path} was made with; give the folder "
                "of the student that sampled"
            )
        return _texts(tokenizer, found)
    folders = [*others, *_likely_folders(cache)]
    if wanted is not None:
        for folder in dict.fromkeys(folders):
            found = _read(folder) if (folder / FILE).is_file() else None
            if found is not None and _vocabulary(found) == wanted:
                return _texts(folder, found)
    looked = ", ".join(dict.fromkeys(map(str, folders))) or "nowhere"
    return TokenTexts(None, f"no tokenizer of this cache was found (looked in {looked})")


def _likely_folders(cache: Cache) -> list[Path]:
    signals = [signal.manifest.model for signal in cache.signals.values()]
    models = [model for model in (cache.manifest.sampler, *signals) if model is not None]
    beside = [cache.path.parent / name / "student" for name in ("sft", "train")]
    return [*(Path(model.source) for model in models), *beside]


def _read(folder: Path) -> Any:
    from tokenizers import Tokenizer

    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE}; give the folder of the student that sampled")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise InputError(f"{path} cannot be read ({error}); copy the tokenizer again") from None


def _vocabulary(tokenizer: Any) -> str:
    return canonical_hash(tokenizer.get_vocab(with_added_tokens=True))


def _texts(folder: Path, tokenizer: Any) -> TokenTexts:
    plain = json.loads(tokenizer.to_str()).get("decoder")
    kinds = _decoder_kinds(plain)
    kind = "bytes" if "ByteLevel" in kinds else "spaces" if kinds & {"Metaspace", "Replace"} else "whole"
    return TokenTexts(folder, None, tokenizer, kind)


def _decoder_kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, dict):
        return set()
    inner = [kind for part in decoder.get("decoders", ()) for kind in _decoder_kinds(part)]
    return {str(decoder.get("type")), *inner}


def _shown(piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02X}" for byte in piece)


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, by letter."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
