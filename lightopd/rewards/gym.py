"""reasoning-gym: its datasets by name, and its own scorers as verifiers."""

import difflib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lightopd.errors import ConfigError


def reasoning_gym_dataset(task: str, count: int, seed: int, options: Mapping[str, Any]) -> Any:
    """The reasoning-gym dataset of a name: `count` entries, drawn from `seed`.

    Raises:
        ConfigError: the package is missing, there is no such task, or the task refuses an option.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise ConfigError("reasoning-gym is not installed; run: pip install 'lightopd[tasks]'") from error
    if task not in DATASETS:
        close = difflib.get_close_matches(task, list(DATASETS), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"reasoning-gym has no task {task!r}; {hint}")
    try:
        return create_dataset(task, size=count, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"reasoning-gym task {task!r} refuses options {dict(options)}: {reason}") from error


def score(task: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Score of a response to a generated entry, by the task's own scorer, in [0, 1].

    Where the response has <answer>...</answer>, the last one is scored, else the whole response. Some
    scorers give a little for a wrong answer of the right form, such as 0.01.

    Args:
        metadata: `entry` as the dataset generated it, and the `options` it was generated with.
    """
    from reasoning_gym.utils import extract_answer

    dataset = _scoring_dataset(task, json.dumps(metadata["options"], sort_keys=True))
    marked = extract_answer(response)
    answer = response.strip() if marked is None else marked
    return float(dataset.score_answer(answer, metadata["entry"]))


@lru_cache(maxsize=16)
def _scoring_dataset(task: str, options: str) -> Any:
    """A dataset that only scores: a scorer reads the entry and the options, not the seed or the count."""
    return reasoning_gym_dataset(task, 1, 0, json.loads(options))
