"""Cached rollouts as the variables of a template."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightopd.cache.contexts import read_texts
from lightopd.cache.reader import read_columns
from lightopd.cache.store import Cache
from lightopd.cache.tables import split_lists
from lightopd.prompts.tokens import response_text
from lightopd.schemas.records import Ids

COLUMNS = (
    "rollout_id",
    "prompt_id",
    "prompt_ids",
    "response_ids",
    "sample_index",
    "origin",
    "reward",
    "finish_reason",
)
RIGHT_AT = 0.5
"""Reward from which a rollout is right, as `objective.correct_at` has it by default."""


@dataclass(frozen=True, slots=True)
class TemplateRow:
    """One rollout, and what a template may name of it."""

    rollout_id: str
    prompt_id: str
    prompt_ids: Ids
    response_ids: Ids
    finish_reason: str
    variables: dict[str, Any]


def template_rows(cache: Cache, texts: Sequence[str], tokenizer: Any) -> list[list[TemplateRow]]:
    """Every rollout, shard by shard; each sees all rollouts of its prompt.

    Args:
        cache: complete, with the text columns.
        texts: names of text columns.
        tokenizer: of the rollouts.

    Raises:
        CacheError: a shard is missing or damaged.
    """
    shards = [_rows(cache, shard, texts, tokenizer) for shard in cache.shards]
    groups: dict[str, list[TemplateRow]] = {}
    for row in (row for rows in shards for row in rows):
        groups.setdefault(row.prompt_id, []).append(row)
    for prompt_id, members in groups.items():
        own = [dict(row.variables) for row in members]
        rewards = [one["reward"] for one in own if one["reward"] is not None]
        more = {
            "responses": own,
            "pass_rate": sum(rewards) / len(rewards) if rewards else None,
            "coin": hashlib.sha256(prompt_id.encode()).digest()[0] % 2,
        }
        for row in members:
            row.variables.update(more)
    return shards


def _rows(cache: Cache, shard: int, texts: Sequence[str], tokenizer: Any) -> list[TemplateRow]:
    table = read_columns(cache, shard, COLUMNS)
    written = {name: read_texts(cache, name, shard).column("text").to_pylist() for name in texts}
    plain = table.drop_columns(["prompt_ids", "response_ids"]).to_pylist()
    ids = (split_lists(table.column(name)) for name in ("prompt_ids", "response_ids"))
    found = []
    for place, (row, prompt_ids, response_ids) in enumerate(zip(plain, *ids, strict=True)):
        assert prompt_ids is not None, "never null on disk"
        assert response_ids is not None, "never null on disk"
        reward = row["reward"]
        variables = {
            "response": response_text(response_ids, tokenizer),
            "reward": reward,
            "is_right": reward is not None and reward >= RIGHT_AT,
            "is_wrong": reward is not None and reward < RIGHT_AT,
            "origin": row["origin"],
            "sample_index": row["sample_index"],
            "texts": {name: values[place] for name, values in written.items()},
        }
        names = (row["rollout_id"], row["prompt_id"])
        found.append(TemplateRow(*names, prompt_ids, response_ids, row["finish_reason"], variables))
    return found
