"""Prompts from a file or a dataset, from reasoning-gym, or from the built-in demo task."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lightopd.errors import InputError
from lightopd.prompts.files import kind_of, read_rows
from lightopd.prompts.generated import reasoning_gym_prompts, running_totals_prompts
from lightopd.prompts.shapes import SHAPE_COLUMNS, ShapedRow, Turn, shape_row
from lightopd.prompts.values import answer_text, identifier, text_or_none
from lightopd.rewards.reward import find_verifier
from lightopd.schemas.configs import FilePrompts, PromptsConfig, ReasoningGymPrompts
from lightopd.schemas.prompts import ROW_FIELDS
from lightopd.schemas.records import Prompt, prompt_content_id

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recognised:
    """The prompts of a source, and one sentence on what it was taken for."""

    prompts: list[Prompt]
    sentence: str | None
    """None for prompts that were not read from a file."""


def load_prompts(config: PromptsConfig, *, all_columns: bool = False) -> list[Prompt]:
    """The prompts alone of `recognise_prompts`."""
    return recognise_prompts(config, all_columns=all_columns).prompts


def recognise_prompts(config: PromptsConfig, *, all_columns: bool = False) -> Recognised:
    """Prompts of a source in its order, `limit` of them after `skip`; no two share a `prompt_id`.

    Past the end it continues at the first prompt, so that every `skip` gives prompts; none comes twice.

    With `all_columns`, a file's columns beyond those of the prompt are kept in `Prompt.metadata`.

    Raises:
        InputError: a file is missing, empty or broken; the message names file, row and remedy.
        ConfigError: an unknown task, verifier or setting, or a package that is not installed.
    """
    if config.skip:
        whole = config.model_copy(update={"skip": 0, "limit": None})
        found = recognise_prompts(whole, all_columns=all_columns)
        everything = found.prompts
        count = min(config.limit or len(everything), len(everything))
        chosen = [everything[(config.skip + place) % len(everything)] for place in range(count)]
        return replace(found, prompts=chosen)
    if isinstance(config, FilePrompts):
        return _from_file(config, all_columns)
    if isinstance(config, ReasoningGymPrompts):
        return Recognised(reasoning_gym_prompts(config), None)
    return Recognised(running_totals_prompts(config), None)


def _from_file(config: FilePrompts, all_columns: bool) -> Recognised:
    find_verifier(config.verifier)
    roots = {path.partition(".")[0] for path in config.columns.values()} | set(config.columns.values())
    wanted = None if all_columns else {*SHAPE_COLUMNS, *roots}
    seen = _Seen()
    prompts: list[Prompt] = []
    for number, row in islice(read_rows(config, wanted), config.limit):
        where = f"{config.path}, row {number}"
        shaped = shape_row(row, config.columns, where)
        prompt = seen.note(prompt_of(shaped, where, config.verifier), number, row, shaped)
        further = {name: value for name, value in row.items() if name not in ROW_FIELDS}
        prompts.append(replace(prompt, metadata=further) if all_columns else prompt)
    if not prompts:
        raise InputError(f"{config.path} has no prompts; give a file with at least one row")
    return Recognised(prompts, seen.sentence(config))


class _Seen:
    """What the rows so far had, for refusing one that comes twice and for saying what was recognised."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.shapes: Counter[str] = Counter()
        self.sources: dict[str, str] = {}
        self.columns: set[str] = set()
        self.read: set[str] = set()
        self.num_answered = 0

    def note(self, prompt: Prompt, number: int, row: dict[str, Any], shaped: ShapedRow) -> Prompt:
        if prompt.prompt_id in self.rows:
            what = (
                f"has id {prompt.prompt_id!r}"
                if shaped.fields.get("id") is not None
                else "holds the same prompt"
            )
            raise InputError(
                f"{prompt.where} {what} as row {self.rows[prompt.prompt_id]} does; "
                "remove one of them, or give each row an `id` of its own"
            )
        self.rows[prompt.prompt_id] = number
        self.shapes[shaped.shape] += 1
        self.sources |= shaped.sources
        self.columns |= row.keys()
        self.read |= shaped.read
        self.num_answered += _is_answered(shaped.turns)
        return prompt

    def sentence(self, config: FilePrompts) -> str:
        shapes = ", ".join(f"{_rows(count)} as {shape}" for shape, count in self.shapes.items())
        parts = [f"{config.path} read as {kind_of(config.path)}: {shapes}"]
        if self.sources:
            parts.append(", ".join(f"{name} from {path}" for name, path in sorted(self.sources.items())))
        if self.num_answered:
            parts.append(f"the assistant's last turn left out of {_rows(self.num_answered)}")
        unread = sorted(map(str, self.columns - self.read))
        if unread:
            parts.append(f"not read: {', '.join(unread[:12])}{' ...' if len(unread) > 12 else ''}")
        return "; ".join(parts)


def prompt_of(shaped: ShapedRow, where: str, verifier: str) -> Prompt:
    """The prompt of a shaped row, without the assistant's last turn."""
    turns = None if shaped.turns is None else _without_answer(shaped.turns, where)
    fields = shaped.fields
    answer = answer_text(fields.get("answer"), where)
    tools, options = fields.get("tools"), fields.get("chat_template_kwargs") or {}
    content = prompt_content_id(shaped.text, turns, tools, options)
    return Prompt(
        prompt_id=identifier(fields.get("id"), where) or content,
        messages=turns,
        text=shaped.text,
        answer=answer,
        domain=text_or_none(fields.get("domain"), f"{where}: `domain`"),
        verifier=None if answer is None else verifier,
        tools=tuple(tools) if tools else None,
        template_options=options,
        where=where,
    )


def _rows(count: int) -> str:
    return f"{count} {'row' if count == 1 else 'rows'}"


def _is_answered(turns: Sequence[Turn] | None) -> bool:
    return turns is not None and turns[-1]["role"] == "assistant"


def _without_answer(turns: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """The turns before the assistant's last one: what a model is to answer."""
    asked = turns[:-1] if _is_answered(turns) else turns
    if not asked:
        raise InputError(f"{where} has an assistant's turn alone; put a user's turn before it")
    return asked
