"""Prompts that are made, not read: reasoning-gym's tasks and the built-in demo task."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from lightopd.errors import ConfigError
from lightopd.rewards.gym import reasoning_gym_dataset
from lightopd.schemas.configs import ReasoningGymPrompts, RunningTotalsPrompts
from lightopd.schemas.records import Prompt, prompt_content_id, short_hash


def reasoning_gym_prompts(config: ReasoningGymPrompts) -> list[Prompt]:
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
                prompt_id=short_hash(key),
                messages=None,
                text=entry["question"],
                answer=entry["answer"],
                domain=config.task,
                verifier=f"reasoning_gym:{config.task}",
                metadata={"entry": entry, "options": config.options},
            )
        )
    return prompts


def running_totals_prompts(config: RunningTotalsPrompts) -> list[Prompt]:
    """Sums of the demo task, each with its final total as the answer."""
    drawn = _running_totals(config.seed, config.count, config.split, config.addends)
    return list(drawn[: config.limit])


@lru_cache(maxsize=4)
def _running_totals(
    seed: int, count: int, split: Literal["train", "heldout"], addends: int
) -> tuple[Prompt, ...]:
    """All of them; rounds take a few of the same ones each."""
    from lightopd.rewards.running_totals import NUM_ADDENDS, running_totals

    # What a prompt of the usual length says of itself is part of every cache's hash of its prompts.
    metadata = {} if addends == NUM_ADDENDS else {"addends": addends}
    try:
        rows: Iterable[dict[str, str]] = running_totals(seed, count, split, addends)
    except ValueError as error:
        raise ConfigError(f"running_totals: {error}") from error
    return tuple(
        Prompt(
            prompt_id=prompt_content_id(row["prompt"], None),
            messages=None,
            text=row["prompt"],
            answer=row["answer"],
            domain="running_totals",
            verifier="running_totals",
            metadata=metadata,
        )
        for row in rows
    )
