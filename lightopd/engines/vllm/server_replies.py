"""What a vLLM server may reply, as types, and log-probabilities out of its JSON.

R = response tokens, K = top-k, M = K + 1 entries of a position (its own token, then the K most likely).
"""

import math
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lightopd.errors import EngineError
from lightopd.schemas import records
from lightopd.schemas.records import Floats, Ids

LEAST_LOGPROB = -9999.0
"""What a server writes for minus infinity, which JSON does not have."""

TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIdKey = Annotated[int, Field(ge=0, lt=2**31)]
"""A key of a JSON object is a string."""


def _number(value: Any) -> Any:
    """A log-probability out of JSON, which has no infinity; NaN where there is none."""
    if value is None:
        return math.nan
    return -math.inf if isinstance(value, int | float) and value <= LEAST_LOGPROB else value


Logprob = Annotated[float, Field(strict=True, allow_inf_nan=True), BeforeValidator(_number)]


class Reply(BaseModel):
    """A part of a reply; fields that are not read may be there."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Version(Reply):
    """Of `/version`."""

    version: str = Field(min_length=1, max_length=100)


class ModelCard(Reply):
    """A model that is served."""

    id: str = Field(max_length=1000)
    root: str | None = Field(None, max_length=4000)
    parent: str | None = Field(None, max_length=1000)
    max_model_len: int = Field(ge=2, lt=2**31)


class Models(Reply):
    """Of `/v1/models`."""

    data: list[ModelCard] = []


class Tokens(Reply):
    """Of `/tokenize`."""

    tokens: list[TokenId]


class Entry(Reply):
    """The log-probability of one token at one position."""

    logprob: Logprob
    rank: int | None = None


class DrawnLogprobs(Reply):
    """The log-probabilities of the tokens that were drawn."""

    token_logprobs: list[Logprob] = []


class Choice(Reply):
    """One completion."""

    prompt_token_ids: list[TokenId] | None = None
    token_ids: list[TokenId] = []
    finish_reason: str | None = Field(None, max_length=100)
    stop_reason: int | str | None = None
    logprobs: DrawnLogprobs | None = None
    prompt_logprobs: list[dict[TokenIdKey, Entry] | None] | None = None


class Completion(Reply):
    """Of `/v1/completions`."""

    choices: list[Choice] = Field(min_length=1)


Parsed = TypeVar("Parsed", bound=Reply)


def parse(kind: type[Parsed], reply: Any, name: str) -> Parsed:
    """A reply as its type.

    Raises:
        EngineError: it is not what vLLM answers; `name` says whose or to what.
    """
    try:
        return kind.model_validate(reply)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"][:4])) or "the top"
        raise EngineError(
            f"{name}: the reply is not vLLM's, {where[:80]}: {first['msg']}; check that it is a vLLM server"
        ) from error


def response_rows(name: str, choice: Choice, sequence: records.Sequence, top_k: int) -> tuple[Ids, Floats]:
    """Ids and log-probabilities [R, M] of the response out of a server's dictionaries by token id.

    A position has K entries where its own token is among the K most likely, and K + 1 where it is not.

    Raises:
        EngineError: a position, its own token or one of the K is missing.
    """
    positions = choice.prompt_logprobs
    first, length = len(sequence.prompt_ids), len(sequence.prompt_ids) + len(sequence.response_ids)
    if positions is None or len(positions) != length:
        raise EngineError(
            f"{name} has {length} tokens and came back with {len(positions or ())} log-probabilities"
        )
    ids_RM = np.empty((length - first, top_k + 1), dtype=np.int32)
    logprobs_RM = np.empty((length - first, top_k + 1), dtype=np.float32)
    for row, (own_id, given) in enumerate(
        zip(sequence.response_ids.tolist(), positions[first:], strict=True)
    ):
        entries = given or {}
        own = entries.get(own_id)
        others = [token for token in entries if token != own_id]
        is_inside = own is not None and len(others) == top_k - 1 and (own.rank or 1) <= top_k
        if own is None or not (is_inside or len(others) == top_k):
            raise EngineError(
                f"{name}: the server gave {len(others)} log-probabilities beside that of token {own_id} at "
                f"response position {row}, {top_k} were asked for; start it with --max-logprobs {top_k}"
            )
        topk = [*others, own_id] if is_inside else others
        ids_RM[row] = [own_id, *topk]
        logprobs_RM[row] = [own.logprob, *(entries[token].logprob for token in topk)]
    return ids_RM, logprobs_RM
