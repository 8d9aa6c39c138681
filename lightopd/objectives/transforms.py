"""Data transforms: caches' rows in, rows of a new cache out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lightopd.errors import InputError
from lightopd.schemas.records import Rollout


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rollouts of a preference cache."""

    rollouts: tuple[Rollout, ...]
    """For each prompt the teacher's answer, then the student's."""
    dropped: dict[str, int]
    """Rows left out, by reason."""


def pair_rollouts(teacher: Iterable[Rollout], student: Iterable[Rollout]) -> Pairs:
    """One answer of the teacher and one of the student for each prompt that has both (arXiv 2604.03873).

    The answer with the lowest sample index is taken. Prompts keep the order of the teacher's rows. Origins
    are set to `teacher` and `student`; log-probabilities at rollout stay those of whoever wrote the answer.

    Raises:
        InputError: a prompt was rendered to other ids for one of the two, or no prompt has both.
    """
    chosen, others = _first(teacher, "teacher"), _first(student, "student")
    both = [prompt for prompt in chosen.rows if prompt in others.rows]
    if not both:
        raise InputError(
            "no prompt has both a teacher's and a student's answer; make both caches from the same prompts"
        )
    for prompt in both:
        if not np.array_equal(chosen.rows[prompt].prompt_ids, others.rows[prompt].prompt_ids):
            raise InputError(
                f"prompt {prompt} has other ids in the teacher's cache than in the student's; use one "
                f"tokenizer and one rendering for both"
            )
    dropped = {
        "teacher answer without a student's": len(chosen.rows) - len(both),
        "student answer without a teacher's": len(others.rows) - len(both),
        "further answers to a prompt": chosen.further + others.further,
    }
    rows = tuple(row for prompt in both for row in (chosen.rows[prompt], others.rows[prompt]))
    return Pairs(rows, {reason: number for reason, number in dropped.items() if number})


@dataclass(slots=True)
class _Answers:
    rows: dict[str, Rollout]
    further: int


def _first(rollouts: Iterable[Rollout], origin: str) -> _Answers:
    answers = _Answers({}, 0)
    for rollout in _by_sample(rollouts):
        if rollout.prompt_id in answers.rows:
            answers.further += 1
        else:
            answers.rows[rollout.prompt_id] = _with_origin(rollout, origin)
    return answers


def _by_sample(rollouts: Iterable[Rollout]) -> Sequence[Rollout]:
    return sorted(rollouts, key=lambda rollout: rollout.sample_index)


def _with_origin(rollout: Rollout, origin: str) -> Rollout:
    values = {name: getattr(rollout, name) for name in Rollout.__slots__}
    return Rollout(**{**values, "origin": origin})
