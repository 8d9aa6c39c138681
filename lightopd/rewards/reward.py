"""The reward of a response: which verifier a prompt names, and what it says."""

import difflib
import importlib
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from lightopd.errors import ConfigError, InputError, LightopdError
from lightopd.rewards import comparisons, gym
from lightopd.schemas.records import Prompt

Verifier = Callable[[str, Any, Mapping[str, Any]], float]
"""(response, answer, the prompt's metadata) -> reward in [0, 1]."""

REASONING_GYM = "reasoning_gym:"


def reward_of(prompt: Prompt, response_text: str) -> float | None:
    """Reward of a response in [0, 1]; None where the prompt names no verifier.

    Raises:
        ConfigError: the verifier is unknown or its package is missing.
        InputError: the verifier fails on this prompt, or returns something outside [0, 1].
    """
    if prompt.verifier is None:
        return None
    verifier = find_verifier(prompt.verifier)
    where = f"verifier {prompt.verifier} on prompt {prompt.prompt_id}"
    try:
        reward = verifier(response_text, prompt.answer, prompt.metadata)
    except LightopdError:
        raise
    except Exception as error:  # a verifier is a program of somebody else's, and fails in any way
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{where} failed with {type(error).__name__}: {reason}; correct it or the prompt"
        ) from error
    try:
        value = float(reward)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{where} returned {reward!r}; a reward is a number from 0 to 1")
    return value


@lru_cache(maxsize=64)
def find_verifier(name: str) -> Verifier:
    """The verifier of a name: a built-in one, `reasoning_gym:<task>`, or `pkg.mod:function`.

    Raises:
        ConfigError: there is no such verifier, or its module cannot be imported.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith(REASONING_GYM):
        task = name.removeprefix(REASONING_GYM)
        return lambda response, answer, metadata: gym.score(task, response, metadata)
    if ":" in name:
        return _imported(name)
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use {', '.join(BUILT_IN)}, or `pkg.mod:function`"
    raise ConfigError(f"no verifier {name!r}; {hint}")


def _imported(name: str) -> Verifier:
    module_name, _, function_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"verifier {name!r} cannot be imported: {error}; check the name and PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(
            f"verifier {name!r} is a {type(found).__name__}; name a function (response, answer, metadata)"
        )
    verifier: Verifier = found
    return verifier


def _running_totals(response: str, answer: str, metadata: Mapping[str, Any]) -> float:
    from lightopd.rewards.running_totals import NUM_ADDENDS, total_reward

    return total_reward(response, answer, int(metadata.get("addends", NUM_ADDENDS)))


BUILT_IN: dict[str, Verifier] = {
    "exact": comparisons.exact,
    "last_number": comparisons.last_number,
    "math_verify": comparisons.math_verify,
    "running_totals": _running_totals,
}


def can_match(verifier: str | None, answer: str) -> bool:
    """Whether some response can earn a reward for this answer; True for a verifier that is not built in."""
    possible = CAN_MATCH.get(verifier or "")
    return True if possible is None else possible(answer)


CAN_MATCH: dict[str, Callable[[str], bool]] = {
    "exact": lambda answer: bool(answer.split()),
    "math_verify": comparisons.is_expression,
    "running_totals": lambda answer: answer.isascii() and answer.isdecimal(),
}
"""What an answer must be for some response to match it; `last_number` refuses an answer without a number."""
