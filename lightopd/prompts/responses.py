"""Responses that exist already: text, ids or whole conversations of a file, as ids with a loss mask.

Text is tokenised once, with the student's tokenizer and chat template, as the student would have written it:
the prompt with the opening of the assistant's turn, then the response, then the token that ends a turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from typing import Any

import numpy as np

from lightopd.errors import InputError
from lightopd.prompts.files import read_rows
from lightopd.prompts.load import prompt_of
from lightopd.prompts.shapes import ShapedRow, Turn, checked_turns, mapped_value, shape_row
from lightopd.prompts.tokens import apply_template, render_prompt
from lightopd.prompts.values import check_values, told
from lightopd.schemas.configs import FilePrompts
from lightopd.schemas.prompts import RESPONSE_FIELDS, ROW_FIELDS
from lightopd.schemas.records import Bools, Ids, Prompt, short_hash

LARGEST_ID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a prompt, as ids."""

    prompt: Prompt
    prompt_ids: Ids
    response_ids: Ids
    loss_mask: Bools
    """[R], True where the model wrote the token."""
    turns: Ids
    """[R], index of the assistant's turn that a token belongs to or leads to."""
    is_truncated: bool
    reward: float | None
    """As the file has it; None where a verifier is to say."""
    where: str


@dataclass(frozen=True, slots=True)
class Writer:
    """What turns text into ids: the student's tokenizer, and how its prompts are rendered."""

    tokenizer: Any
    stops: tuple[int, ...]
    config: FilePrompts
    clock: datetime | None


def read_responses(writer: Writer) -> Iterator[Response]:
    """Every response of a file in its order; a row may hold several.

    Raises:
        InputError: a row without a response, or with ids or masks that do not fit; names file and row.
    """
    config = writer.config
    columns = {name: path for name, path in config.columns.items() if name in ROW_FIELDS}
    end = None if config.limit is None else config.skip + config.limit
    for number, row in islice(read_rows(config, None), config.skip, end):
        where = f"{config.path}, row {number}"
        given = {name: row.get(name) for name in RESPONSE_FIELDS}
        given |= {
            name: mapped_value(row, path, where)
            for name, path in config.columns.items()
            if name in RESPONSE_FIELDS
        }
        taken = {path for name, path in config.columns.items() if name in RESPONSE_FIELDS}
        rest = {name: value for name, value in row.items() if name not in taken}
        yield from _responses_of(rest, given, columns, where, writer)


def _responses_of(
    row: dict[str, Any], given: dict[str, Any], columns: dict[str, str], where: str, writer: Writer
) -> Iterator[Response]:
    if given["prompt_ids"] is not None and not ({"prompt", "messages"} & {*columns, *row}):
        shaped = ShapedRow(
            "ids", text="ids", fields={n: row[n] for n in ROW_FIELDS if row.get(n) is not None}
        )
    else:
        shaped = shape_row(row, columns, where)
    if given["response"] is None and shaped.shape == "Alpaca":
        given["response"] = row.get("output")
    said = given["completion"]
    if isinstance(said, list) and said and isinstance(said[0], dict):
        shaped.turns = (*_as_turns(shaped), *checked_turns(said, "completion", where))
        given["completion"] = None
    texts = _listed(given["response"] if given["response"] is not None else given["completion"])
    texts = texts or _listed(given["responses"])
    ids = given["response_ids"]
    if ids is not None or (texts and not isinstance(texts[0], str)):
        yield from _from_ids(shaped, given, _rows_of_ids(ids if ids is not None else texts), where, writer)
    elif texts:
        yield from _from_texts(shaped, given, texts, where, writer)
    elif shaped.turns is not None and any(turn["role"] == "assistant" for turn in shaped.turns):
        yield _from_turns(shaped, given, where, writer)
    else:
        raise InputError(
            f"{where} has no response; give `response`, `responses`, `response_ids`, or a conversation with "
            "an assistant's turn, or name the column with --map response=answer"
        )


def _from_ids(
    shaped: ShapedRow, given: dict[str, Any], rows: list[Any], where: str, writer: Writer
) -> Iterator[Response]:
    prompt, prompt_ids = _prompt(shaped, given, where, writer)
    masks = _rows_of_ids(given["loss_mask"]) if given["loss_mask"] is not None else [None] * len(rows)
    if len(masks) != len(rows):
        raise InputError(f"{where} has {len(rows)} responses and {len(masks)} loss masks; give one for each")
    for place, (values, mask) in enumerate(zip(rows, masks, strict=True)):
        ids = _ids(values, f"{where}: `response_ids`")
        is_response = np.ones(len(ids), np.bool_) if mask is None else _mask(mask, len(ids), where)
        turns = np.cumsum(np.diff(is_response, prepend=True) & is_response).astype(np.int32)
        yield _response(prompt, prompt_ids, ids, is_response, turns, given, place, len(rows), where, writer)


def _from_texts(
    shaped: ShapedRow, given: dict[str, Any], texts: list[Any], where: str, writer: Writer
) -> Iterator[Response]:
    prompt, prompt_ids = _prompt(shaped, given, where, writer)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{where}: response {place + 1} is {told(text)}; it must be text, or all be ids")
        check_values(text, f"{where}: response {place + 1}")
        ids = list(writer.tokenizer.encode(text, add_special_tokens=False))
        is_cut = _one(given["finish_reason"], place, len(texts), where, "finish_reason") == "length"
        if not is_cut and (not ids or ids[-1] not in writer.stops):
            ids.append(_end_id(prompt, writer))
        made = np.array(ids, np.int32)
        whole, first = np.ones(len(ids), np.bool_), np.zeros(len(ids), np.int32)
        yield _response(prompt, prompt_ids, made, whole, first, given, place, len(texts), where, writer)


def _from_turns(shaped: ShapedRow, given: dict[str, Any], where: str, writer: Writer) -> Response:
    """A conversation: from the first assistant's turn on everything is the response, others' turns masked."""
    turns = _as_turns(shaped)
    weights = [turn.get("weight", 1) != 0 for turn in turns]
    turns = tuple({key: value for key, value in turn.items() if key != "weight"} for turn in turns)
    first = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    shaped.turns, shaped.text = turns[:first], None
    if not first:
        raise InputError(f"{where} begins with the assistant's turn; put a user's turn before it")
    prompt, prompt_ids = _prompt(shaped, given, where, writer)
    pieces = list(_pieces(prompt, turns, first, writer))
    ids, is_response, numbers = [], [], []
    for number, (place, text, is_written) in enumerate(pieces):
        own = list(writer.tokenizer.encode(text, add_special_tokens=False))
        end = next((i + 1 for i, token in enumerate(own) if token in writer.stops), len(own))
        if number == len(pieces) - 1:
            own = own[:end]
            if own[-1:] and own[-1] not in writer.stops and given["finish_reason"] != "length":
                own, end = [*own, _end_id(prompt, writer)], end + 1
        ids += own
        is_response += [is_written and weights[place] and i < end for i in range(len(own))]
        numbers += [sum(written for _, _, written in pieces[: number + 1]) - is_written] * len(own)
    return _response(
        prompt,
        prompt_ids,
        np.array(ids, np.int32),
        np.array(is_response, np.bool_),
        np.array(numbers, np.int32),
        given,
        0,
        1,
        where,
        writer,
    )


def _pieces(
    prompt: Prompt, turns: Sequence[Turn], first: int, writer: Writer
) -> Iterator[tuple[int, str, bool]]:
    """The text after the prompt, cut where the assistant's turns begin and end: place, text, whose."""
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    whole = _rendered(prompt, turns[: last + 1], False, writer)
    at = len(_rendered(prompt, turns[:first], True, writer))
    for place in range(first, last + 1):
        if turns[place]["role"] != "assistant":
            continue
        start = _rendered(prompt, turns[:place], True, writer)
        end = _rendered(prompt, turns[: place + 1], False, writer)
        if not (whole.startswith(start) and whole.startswith(end) and at <= len(start) <= len(end)):
            raise InputError(
                f"{prompt.place}: the chat template writes turn {place + 1} in another way once later "
                "turns follow (those that leave out earlier thinking do); give response_ids, or end "
                "the row at that turn"
            )
        if start[at:]:
            yield place, start[at:], False
        yield place, end[len(start) :], True
        at = len(end)


def _rendered(prompt: Prompt, turns: Sequence[Turn], opens: bool, writer: Writer) -> str:
    how = {"tokenize": False, "add_generation_prompt": opens}
    text = apply_template(prompt, turns, writer.tokenizer, writer.config, writer.clock, **how)
    assert isinstance(text, str)
    return text


def _end_id(prompt: Prompt, writer: Writer) -> int:
    """The token that ends a turn in the chat template; the tokenizer's end token for plain text."""
    if writer.config.render == "chat":
        turns = prompt.messages or ({"role": "user", "content": prompt.text},)
        opened = _rendered(prompt, turns, True, writer)
        whole = _rendered(prompt, [*turns, {"role": "assistant", "content": "a"}], False, writer)
        rest = whole[len(opened) :] if whole.startswith(opened) else ""
        for token in writer.tokenizer.encode(rest, add_special_tokens=False):
            if token in writer.stops:
                return int(token)
    eos = writer.tokenizer.eos_token_id
    return int(eos if eos is not None else writer.stops[0])


def _prompt(shaped: ShapedRow, given: dict[str, Any], where: str, writer: Writer) -> tuple[Prompt, Ids]:
    prompt = prompt_of(shaped, where, writer.config.verifier)
    if given["prompt_ids"] is not None:
        ids = _ids(given["prompt_ids"], f"{where}: `prompt_ids`")
        if shaped.shape == "ids" and "id" not in shaped.fields:
            prompt = replace(prompt, prompt_id=short_hash({"prompt_ids": ids.tolist()}))
        return prompt, ids
    return prompt, render_prompt(prompt, writer.tokenizer, writer.config, writer.clock)


def _response(
    prompt: Prompt,
    prompt_ids: Ids,
    ids: Ids,
    is_response: Bools,
    turns: Ids,
    given: dict[str, Any],
    place: int,
    count: int,
    where: str,
    writer: Writer,
) -> Response:
    if not is_response.any():
        raise InputError(f"{where} has a response without a token to train on; remove the row")
    if max(ids.max(), prompt_ids.max()) >= len(writer.tokenizer):
        raise InputError(
            f"{where} has token {max(ids.max(), prompt_ids.max())}, the student's tokenizer has "
            f"{len(writer.tokenizer)}; these ids are of another tokenizer: give the text"
        )
    reward = _one(given["reward"], place, count, where, "reward")
    if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
        raise InputError(f"{where}: `reward` is {told(reward)}; it must be a number")
    check_values(reward, f"{where}: `reward`")
    return Response(
        prompt=prompt,
        prompt_ids=prompt_ids,
        response_ids=ids,
        loss_mask=is_response,
        turns=turns,
        is_truncated=int(ids[-1]) not in writer.stops,
        reward=None if reward is None else float(reward),
        where=where,
    )


def _as_turns(shaped: ShapedRow) -> tuple[Turn, ...]:
    return shaped.turns or ({"role": "user", "content": shaped.text},)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _rows_of_ids(value: Any) -> list[Any]:
    """One list of ids as a list of lists."""
    rows = _listed(value)
    return rows if rows and isinstance(rows[0], list) else [rows]


def _one(value: Any, place: int, count: int, where: str, name: str) -> Any:
    """A value for one of several responses: given once for all, or as a list with one for each."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise InputError(f"{where} has {count} responses and {len(value)} of `{name}`; give one for each")
    return value[place]


def _ids(values: Any, what: str) -> Ids:
    is_whole = isinstance(values, list) and all(type(one) is int and 0 <= one <= LARGEST_ID for one in values)
    if not is_whole or not values:
        raise InputError(f"{what} is {told(values)}; it must be a list of token ids that is not empty")
    return np.array(values, np.int32)


def _mask(values: Any, length: int, where: str) -> Bools:
    if not isinstance(values, list) or not all(one in (0, 1) for one in values):
        raise InputError(f"{where}: `loss_mask` is {told(values)}; it must be a list of 0 and 1")
    if len(values) != length:
        raise InputError(
            f"{where} has {length} response ids and {len(values)} of `loss_mask`; make them equal"
        )
    return np.array(values, np.bool_)
