"""Prompts from a file, from reasoning-gym, or from the built-in demo task."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from lightopd.errors import ConfigError, InputError
from lightopd.rewards.gym import reasoning_gym_dataset
from lightopd.rewards.reward import find_verifier
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import FilePrompts, PromptsConfig, ReasoningGymPrompts, RunningTotalsPrompts
from lightopd.schemas.records import Prompt

COLUMNS = ("prompt", "messages", "answer", "id", "domain")
ID_CHARS = 32

Row = tuple[int, dict[str, Any]]


def load_prompts(config: PromptsConfig, *, all_columns: bool = False) -> list[Prompt]:
    """Prompts of a source in its order, `limit` of them after `skip`; no two share a `prompt_id`.

    Past the end it goes on at the first prompt, so that every `skip` gives prompts; none comes twice.

    With `all_columns`, a file's columns beyond `COLUMNS` are kept in `Prompt.metadata`.

    Raises:
        InputError: a file is missing, empty or broken; the message names file, row and remedy.
        ConfigError: an unknown task, verifier or setting, or a package that is not installed.
    """
    if config.skip:
        whole = config.model_copy(update={"skip": 0, "limit": None})
        everything = load_prompts(whole, all_columns=all_columns)
        count = min(config.limit or len(everything), len(everything))
        return [everything[(config.skip + place) % len(everything)] for place in range(count)]
    if isinstance(config, FilePrompts):
        return _from_file(config, all_columns)
    if isinstance(config, ReasoningGymPrompts):
        return _from_reasoning_gym(config)
    return _from_running_totals(config)


def _from_file(config: FilePrompts, all_columns: bool) -> list[Prompt]:
    find_verifier(config.verifier)
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in islice(_rows(config.path, all_columns), config.limit):
        prompt = _prompt_of(row, f"{config.path}, row {number}", config.verifier)
        if all_columns:
            further = {name: value for name, value in row.items() if name not in COLUMNS}
            prompt = replace(prompt, metadata=further)
        if prompt.prompt_id in seen:
            what = f"has id {prompt.prompt_id!r}" if row.get("id") is not None else "holds the same prompt"
            raise InputError(
                f"{config.path}, row {number} {what} as row {seen[prompt.prompt_id]} does; "
                "remove one of them, or give each row an `id` of its own"
            )
        seen[prompt.prompt_id] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{config.path} has no prompts; give a file with at least one row")
    return prompts


def _rows(path: Path, all_columns: bool) -> Iterator[Row]:
    readers = {".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path} ends in {path.suffix!r}; prompts are read from .jsonl, .ndjson or .parquet files"
        )
    if not path.is_file():
        raise InputError(f"no prompt file {path}; check the path")
    try:
        yield from reader(path, all_columns)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _jsonl_rows(path: Path, _: bool) -> Iterator[Row]:
    """Rows by line number from 1, with all their keys; empty lines are skipped and counted."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise InputError(
                    f"{path}, row {number} is not valid JSON ({error}); correct or remove it"
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, row {number} is a {type(row).__name__}; write one JSON object with `prompt` or "
                    "`messages` on each line"
                )
            yield number, row


def _parquet_rows(path: Path, all_columns: bool) -> Iterator[Row]:
    """Rows by position from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        there = file.schema_arrow.names
        columns = [name for name in there if all_columns or name in COLUMNS]
        if not {"prompt", "messages"} & set(columns):
            raise InputError(f"{path} has columns {there}; it needs `prompt` or `messages`")
        batches = (batch for batch in file.iter_batches(columns=columns))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} cannot be read as Parquet ({reason}); write or copy it again") from error


def _prompt_of(row: dict[str, Any], where: str, verifier: str) -> Prompt:
    text, messages = row.get("prompt"), row.get("messages")
    if text is None and messages is None:
        raise InputError(
            f"{where} has neither `prompt` nor `messages` (keys: {sorted(row)}); add one of them"
        )
    if text is not None and messages is not None:
        raise InputError(f"{where} has both `prompt` and `messages`; keep one of them")
    if text is not None and (not isinstance(text, str) or not text):
        raise InputError(f"{where}: `prompt` is {_told(text)}; it must be text that is not empty")
    turns = None if messages is None else _turns(messages, where)
    answer = _answer(row.get("answer"), where)
    return Prompt(
        prompt_id=_identifier(row.get("id"), where) or _content_id({"prompt": text, "messages": turns}),
        messages=turns,
        text=text,
        answer=answer,
        domain=_text_or_none(row.get("domain"), f"{where}: `domain`"),
        verifier=None if answer is None else verifier,
    )


def _turns(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"{where}: `messages` is {_told(messages)}; it must be a list with at least one turn"
        )
    turns = []
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise InputError(
                f"{where}: turn {number} of `messages` is {_told(turn)}; each turn needs `role` and `content`"
            )
        # Parquet gives every turn every key of the column's struct; an absent one is a null there.
        turns.append({key: value for key, value in turn.items() if value is not None or key == "content"})
    if turns[-1]["role"] == "assistant":
        raise InputError(
            f"{where}: the last turn of `messages` is the assistant's; remove it, the model is to answer"
        )
    return tuple(turns)


def _answer(answer: Any, where: str) -> str | None:
    """An answer as text; whole numbers lose `.0`, which tables with gaps add to integers."""
    if answer is None or isinstance(answer, str):
        return answer
    number = not isinstance(answer, bool) and isinstance(answer, int | float | Decimal)
    if not number or not math.isfinite(answer):
        raise InputError(f"{where}: `answer` is {_told(answer)}; it must be text or a finite number")
    return str(int(answer)) if answer == int(answer) else str(answer)


def _identifier(identifier: Any, where: str) -> str | None:
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None) or identifier == "":
        raise InputError(f"{where}: `id` is {_told(identifier)}; it must be text or a whole number")
    return None if identifier is None else str(identifier)


def _text_or_none(value: Any, what: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InputError(f"{what} is {_told(value)}; it must be text")


def _told(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:60]}{'...' if len(shown) > 60 else ''} ({type(value).__name__})"


def _content_id(content: dict[str, Any]) -> str:
    """Prompt id of a prompt without an `id`: a hash of what the model is asked."""
    if content.get("messages") is not None:
        # Parquet can hold dates and decimals inside messages, which JSON cannot.
        content = json.loads(json.dumps(content, default=str))
    return canonical_hash(content)[:ID_CHARS]


def _from_reasoning_gym(config: ReasoningGymPrompts) -> list[Prompt]:
    """Generated tasks; each keeps its entry, with which reasoning-gym scores an answer.

    An entry stays the Python object that was generated: JSON would turn its tuples into lists, and
    some of reasoning-gym's scorers (`arc_agi`, `rearc`) then miss right answers.
    """
    dataset = reasoning_gym_dataset(config.task, config.count, config.seed, config.options)
    count = min(config.count, config.limit or config.count)
    prompts = []
    for index in range(count):
        entry = dataset[index]
        key = {"task": config.task, "seed": config.seed, "index": index, "question": entry["question"]}
        prompts.append(
            Prompt(
                prompt_id=_content_id(key),
                messages=None,
                text=entry["question"],
                answer=entry["answer"],
                domain=config.task,
                verifier=f"reasoning_gym:{config.task}",
                metadata={"entry": entry, "options": config.options},
            )
        )
    return prompts


def _from_running_totals(config: RunningTotalsPrompts) -> list[Prompt]:
    from lightopd.rewards.running_totals import running_totals

    try:
        rows: Iterable[dict[str, str]] = running_totals(config.seed, config.count, config.split)
    except ValueError as error:
        raise ConfigError(f"running_totals: {error}") from error
    return [
        Prompt(
            prompt_id=_content_id({"prompt": row["prompt"], "messages": None}),
            messages=None,
            text=row["prompt"],
            answer=row["answer"],
            domain="running_totals",
            verifier="running_totals",
        )
        for row in islice(rows, config.limit)
    ]
