"""A cache made by the official Lightning-OPD code, taken over with its lineage marked unknown."""

from pathlib import Path
from typing import Any

from pydantic import JsonValue

from lightopd.cache.formats.convert import convert_official
from lightopd.models.limits import model_limits
from lightopd.models.tokenizer import load_tokenizer
from lightopd.pipelines.shared.reports import Report
from lightopd.pipelines.shared.run_folder import writing
from lightopd.prompts.tokens import render_prompt
from lightopd.schemas.configs import FilePrompts, ModelConfig
from lightopd.schemas.records import Prompt

UNKNOWN = (
    "lineage unknown: the file says neither which teacher wrote the student's data nor which student "
    "sampled; training on it needs --allow teacher-mismatch, student-mismatch and tokenizer-mismatch"
)


def import_official(source: Path, cache: Path, tokenizer: str) -> Report:
    """Convert the official Parquet file; prompts are rendered with the tokenizer of the given model folder.

    Raises:
        InputError: the file lacks the official columns, or a row's lengths disagree (named).
    """
    model = ModelConfig(path=tokenizer)
    loaded = load_tokenizer(model)
    rendering = FilePrompts(path=source)

    def encode(prompt: Any) -> list[int]:
        is_text = isinstance(prompt, str)
        messages = None if is_text else tuple(prompt)
        ids = render_prompt(Prompt("", messages, prompt if is_text else None), loaded, rendering)
        return [int(token) for token in ids]

    width = model_limits(model).vocabulary_size
    with writing(cache):
        made = convert_official(source, cache, encode_prompt=encode, vocabulary_size=width)
    figures: dict[str, JsonValue] = {"rollouts": made.num_rollouts, "response_tokens": made.num_tokens}
    return Report("import", str(cache), figures, dropped=made.dropped, notes=(UNKNOWN,))
