"""The shapes that rows come in: text, turns, ShareGPT, Alpaca, and columns of other names by a map."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightopd.errors import InputError
from lightopd.prompts.values import check_values, told
from lightopd.schemas.prompts import RESERVED_TEMPLATE_OPTIONS, ROW_FIELDS

Turn = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
ROLES |= {"model": "assistant", "bot": "assistant", "system": "system", "tool": "tool"}
ROLES |= {"observation": "tool", "function_response": "tool"}
"""ShareGPT's `from` as a role of chat templates."""
QUESTIONS = ("question", "problem", "query", "input", "text", "content", "task")
"""Columns that often hold the prompt; named in a refusal, never taken unasked."""
SHAPE_COLUMNS = {
    *ROW_FIELDS,
    "conversations",
    "instruction",
    "input",
    "system",
    "reward_model",
    "data_source",
}
"""Columns that some shape reads."""


@dataclass(slots=True)
class ShapedRow:
    """A row in the one form that later code reads."""

    shape: str
    """What it was recognised as, in words."""
    text: str | None = None
    turns: tuple[Turn, ...] | None = None
    """Turns as they were given, the assistant's last one included; None where `text` is set."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Values of `ROW_FIELDS` that are not null."""
    sources: dict[str, str] = field(default_factory=dict)
    """Column that a field was taken from, where it is not the field's own name."""
    read: set[str] = field(default_factory=set)
    """Columns of the row that were read."""


def shape_row(row: dict[str, Any], columns: Mapping[str, str], where: str) -> ShapedRow:
    """Recognise a row.

    Args:
        columns: the user's map from a field to the column (or `column.key`) that holds it.

    Raises:
        InputError: no shape fits, or a value is not what its field must be; names file, row and column.
    """
    shaped = ShapedRow("")
    mapped = {name: mapped_value(row, path, where) for name, path in columns.items()}
    shaped.sources = {name: path for name, path in columns.items() if name != path}
    shaped.read = {path if path in row else path.partition(".")[0] for path in columns.values()}
    hidden = {"prompt", "messages"} if {"prompt", "messages"} & mapped.keys() else set()
    own = {name: row.get(name) for name in ROW_FIELDS if name in row and name not in hidden}
    fields = {name: value for name, value in {**own, **mapped}.items() if value is not None}
    shaped.read |= {name for name in own if name not in mapped}
    _shape_prompt(shaped, fields, {} if hidden else row, where)
    _take_from_verl(shaped, fields, row)
    shaped.fields = {name: value for name, value in fields.items() if name not in ("prompt", "messages")}
    for name in ("tools", "chat_template_kwargs"):
        if name in shaped.fields:
            shaped.fields[name] = _from_json(shaped.fields[name], f"{where}: `{name}`")
            check_values(shaped.fields[name], f"{where}: `{name}`")
    _check_template_fields(shaped.fields, where)
    return shaped


def mapped_value(row: Mapping[str, Any], path: str, where: str) -> Any:
    """What stands in a column, or inside one at `column.key`; None where it is null."""
    if path in row:
        return row[path]
    value: Any = row
    for place, key in enumerate(path.split(".")):
        if not isinstance(value, Mapping) or (place == 0 and key not in value):
            raise InputError(
                f"{where} has no column {path!r}, which prompts.columns (--map) names; it has "
                f"{', '.join(sorted(map(str, row)))}"
            )
        value = value.get(key)
        if value is None:
            return None
    return value


def _shape_prompt(shaped: ShapedRow, fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> None:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is not None and messages is not None:
        raise InputError(
            f"{where} has both `prompt` and `messages`; keep one of them, or choose with --map prompt=prompt"
        )
    if isinstance(prompt, list):
        shaped.shape, shaped.turns = "turns in `prompt` (TRL, verl)", checked_turns(prompt, "prompt", where)
    elif prompt is not None:
        shaped.shape, shaped.text = "text in `prompt`", _text(prompt, "prompt", where)
    elif messages is not None:
        found = _from_json(messages, f"{where}: `messages`")
        shaped.shape, shaped.turns = "turns in `messages`", checked_turns(found, "messages", where)
    elif row.get("conversations") is not None:
        shaped.read |= {"conversations", "system"} & row.keys()
        turns = checked_turns(
            _from_json(row["conversations"], f"{where}: `conversations`"), "conversations", where
        )
        shaped.shape, shaped.turns = "ShareGPT", _with_system(turns, row, where)
    elif row.get("instruction") is not None:
        _shape_alpaca(shaped, row, where)
    else:
        _refuse_shape(row or fields, where)


def _shape_alpaca(shaped: ShapedRow, row: Mapping[str, Any], where: str) -> None:
    """`instruction`, then `input` on a line of its own where there is one, as LLaMA-Factory joins them."""
    shaped.shape = "Alpaca"
    shaped.read |= {"instruction", "input", "system"} & row.keys()
    parts = [_text(row["instruction"], "instruction", where)]
    if row.get("input"):
        parts.append(_text(row["input"], "input", where))
    text = "\n".join(parts)
    turns = _with_system(({"role": "user", "content": text},), row, where)
    shaped.text, shaped.turns = (text, None) if len(turns) == 1 else (None, turns)


def _with_system(turns: tuple[Turn, ...], row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    if not row.get("system"):
        return turns
    return ({"role": "system", "content": _text(row["system"], "system", where)}, *turns)


def _take_from_verl(shaped: ShapedRow, fields: dict[str, Any], row: Mapping[str, Any]) -> None:
    """verl keeps the answer in `reward_model.ground_truth` and the domain in `data_source`."""
    rewards = row.get("reward_model")
    truth = rewards.get("ground_truth") if isinstance(rewards, Mapping) else None
    if "answer" not in fields and isinstance(truth, str | int | float):
        fields["answer"], shaped.sources["answer"] = truth, "reward_model.ground_truth"
        shaped.read.add("reward_model")
        if "domain" not in fields and isinstance(row.get("data_source"), str):
            fields["domain"], shaped.sources["domain"] = row["data_source"], "data_source"
            shaped.read.add("data_source")


def _refuse_shape(row: Mapping[str, Any], where: str) -> None:
    found = [name for name in QUESTIONS if name in row]
    example = found[0] if found else "question"
    raise InputError(
        f"{where} has neither `prompt` nor `messages` (keys: {sorted(map(str, row))}); name the column that "
        f"holds the prompt, such as --map prompt={example}"
    )


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: `{column}` is {told(value)}; it must be text that is not empty")
    check_values(value, f"{where}: `{column}`")
    return value


def checked_turns(value: Any, column: str, where: str) -> tuple[Turn, ...]:
    """Turns with `role` and `content` each, refused by place where they are not."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{column}` is {told(value)}; it must be a list with at least one turn")
    check_values(value, f"{where}: `{column}`")
    return tuple(_turn(turn, f"{where}: turn {i} of `{column}`") for i, turn in enumerate(value, start=1))


def _turn(turn: Any, what: str) -> Turn:
    """A turn with `role` and `content`; ShareGPT's `from` and `value` are taken for them."""
    if isinstance(turn, dict) and "from" in turn and "value" in turn:
        if turn["from"] not in ROLES:
            raise InputError(f"{what} is from {told(turn['from'])}; known are {', '.join(ROLES)}")
        further = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": ROLES[turn["from"]], "content": turn["value"], **further}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not _has_content(turn):
        raise InputError(f"{what} is {told(turn)}; each turn needs `role` and `content`")
    # A null key of a turn says what an absent one says; OpenAI's clients write both.
    kept = {key: value for key, value in turn.items() if value is not None or key == "content"}
    return {**kept, "content": _content(kept.get("content"), what)}


def _has_content(turn: Turn) -> bool:
    return "content" in turn or bool(turn.get("tool_calls"))


def _content(content: Any, what: str) -> Any:
    """Text, or null beside tool calls; parts of type text are joined, as templates add texts."""
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise InputError(f"{what} has content {told(content)}; it must be text or parts of type text")
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise InputError(
                f"{what} has a content part {told(part)}; lightopd reads parts of type text only: remove it"
            )
        texts.append(part["text"])
    return "".join(texts)


def _from_json(value: Any, what: str) -> Any:
    """Lists and objects that a table keeps as JSON text, as many tool data sets do."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list | dict) else value


def _check_template_fields(fields: Mapping[str, Any], where: str) -> None:
    tools, options = fields.get("tools"), fields.get("chat_template_kwargs")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
        raise InputError(
            f"{where}: `tools` is {told(tools)}; it must be a list of objects, or that as JSON text"
        )
    if options is None:
        return
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise InputError(f"{where}: `chat_template_kwargs` is {told(options)}; it must be an object")
    reserved = sorted(options.keys() & RESERVED_TEMPLATE_OPTIONS)
    if reserved:
        raise InputError(f"{where}: `chat_template_kwargs` cannot set {', '.join(reserved)}; remove it")
