"""The checksum in a manifest or marker: any byte that was changed after the file was written shows.

A sealed file is `json_bytes` of its fields and of `checksum`, the SHA-256 of `json_bytes` of the others. It
is compared by `lightopd verify`; stages pay no heed to it, since what decides a byte of a shard is compared
with fingerprints and SHA-256 wherever it is used. Files of older versions have none.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightopd.files import json_bytes

SEAL = "checksum"


def sealed(fields: Mapping[str, Any]) -> bytes:
    """A manifest or marker as a file, with its checksum."""
    return json_bytes({**fields, SEAL: hashlib.sha256(json_bytes(fields)).hexdigest()})


def unsealed(plain: Any) -> Any:
    """The fields of a file that was read as JSON, without the checksum."""
    return {name: item for name, item in plain.items() if name != SEAL} if isinstance(plain, dict) else plain


def is_changed(path: Path) -> bool:
    """Whether a sealed file was changed; False for one that is not sealed, is gone or is not JSON."""
    try:
        content = path.read_bytes()
        plain = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(plain, dict) and SEAL in plain and content != sealed(unsealed(plain))
