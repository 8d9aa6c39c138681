"""Log-probabilities out of a vLLM server's JSON.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely).
"""

import math
from typing import Any

import numpy as np

from lightopd.errors import EngineError
from lightopd.schemas import records
from lightopd.schemas.records import Floats, Ids

LEAST_LOGPROB = -9999.0
"""What a server writes for minus infinity, which JSON does not have."""


def response_rows(
    name: str, positions: list[dict[str, Any] | None] | None, sequence: records.Sequence, top_k: int
) -> tuple[Ids, Floats]:
    """Ids and log-probabilities [R, M] of the response out of a server's dictionaries by token id.

    A position has K entries where its own token is among the K most likely, and K + 1 where it is not.

    Raises:
        EngineError: a position, its own token or one of the K is missing.
    """
    first, length = len(sequence.prompt_ids), len(sequence.prompt_ids) + len(sequence.response_ids)
    if positions is None or len(positions) != length:
        raise EngineError(
            f"{name} has {length} tokens and came back with {len(positions or ())} log-probabilities"
        )
    ids_RM = np.empty((length - first, top_k + 1), dtype=np.int32)
    logprobs_RM = np.empty((length - first, top_k + 1), dtype=np.float32)
    for row, (own_id, entries) in enumerate(zip(sequence.response_ids, positions[first:], strict=True)):
        own = (entries or {}).get(str(own_id))
        others = [] if entries is None else [key for key in entries if key != str(own_id)]
        is_inside = own is not None and len(others) == top_k - 1 and (own.get("rank") or 1) <= top_k
        if own is None or entries is None or not (is_inside or len(others) == top_k):
            raise EngineError(
                f"{name}: the server gave {len(others)} log-probabilities beside that of token {own_id} at "
                f"response position {row}, {top_k} were asked for; start it with --max-logprobs {top_k}"
            )
        topk = [*others, str(own_id)] if is_inside else others
        ids_RM[row] = [int(own_id), *map(int, topk)]
        logprobs_RM[row] = [number(own["logprob"]), *(number(entries[key]["logprob"]) for key in topk)]
    return ids_RM, logprobs_RM


def number(value: float | None) -> float:
    """A log-probability out of JSON, which has no infinity; NaN where there is none."""
    if value is None:
        return math.nan
    return -math.inf if value <= LEAST_LOGPROB else float(value)
