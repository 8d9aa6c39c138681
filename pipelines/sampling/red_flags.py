"""What about sampled responses should stop a person: said in the report, refused nowhere."""

from collections.abc import Iterator, Sequence
from typing import Any

from lightopd.cache.index import query
from lightopd.cache.store import Cache
from lightopd.errors import InputError
from lightopd.rewards.reward import can_match, reward_of
from lightopd.schemas.records import Prompt

LARGE_SHARE = 0.5
FEWEST = 4
"""Responses below which a share says nothing."""


def check_answers(prompts: Sequence[Prompt]) -> None:
    """Refuse, before anything is sampled, an answer that its verifier cannot read.

    Raises:
        InputError: names file and row.
    """
    for prompt in prompts:
        if prompt.verifier in ("last_number", "running_totals", "exact"):
            try:
                reward_of(prompt, "")
            except InputError as error:
                raise InputError(f"{prompt.place}: {error}") from error


def answer_flags(prompts: Sequence[Prompt], tokenizer: Any, max_tokens: int) -> tuple[str, ...]:
    """One line where there are answers that no response can match."""
    hopeless = [prompt for prompt in prompts if not _can_be_matched(prompt, tokenizer, max_tokens)]
    if not hopeless:
        return ()
    first = hopeless[0]
    return (
        f"red flag: verifier {first.verifier} can never match {len(hopeless)} of {len(prompts)} answers, "
        f"such as {(first.answer or '')[:40]!r} ({first.place}); choose another verifier or correct them",
    )


def _can_be_matched(prompt: Prompt, tokenizer: Any, max_tokens: int) -> bool:
    if prompt.answer is None:
        return True
    if prompt.verifier == "exact" and len(prompt.answer) > max_tokens:
        return len(tokenizer.encode(prompt.answer, add_special_tokens=False)) <= max_tokens
    return can_match(prompt.verifier, prompt.answer)


def response_flags(cache: Cache) -> tuple[str, ...]:
    """A line for each red flag of a finished cache's rollouts."""
    row = query(
        cache.path,
        """select count(*) as number, avg(truncated::int) as truncated, avg(reward) as reward,
        count(distinct response_ids) as different,
        (select max(n) from (select count(*) as n from rollouts group by response_ids)) as most
        from rollouts""",
    ).to_pylist()[0]
    return tuple(_flags(row)) if row["number"] >= FEWEST else ()


def _flags(row: dict[str, Any]) -> Iterator[str]:
    if row["truncated"] > LARGE_SHARE:
        yield (
            f"red flag: {row['truncated']:.0%} of the responses were cut at sampling.max_tokens; raise it, "
            "or check that the end token of the chat template is among the model's"
        )
    if row["reward"] in (0, 1):
        which = "none" if row["reward"] == 0 else "all"
        yield (
            f"red flag: {which} of the answers were right (mean reward {row['reward']:g}); rewards tell "
            "responses apart no more: check prompts.verifier and the answers, or take other prompts"
        )
    if row["most"] > LARGE_SHARE * row["number"]:
        yield (
            f"red flag: one response is {row['most']} of {row['number']}; check the chat template, and that "
            "sampling.temperature is above 0"
        )
