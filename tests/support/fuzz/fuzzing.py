"""Damages inputs at random, by a seed: wrong types and sizes, lost parts, deep nesting, odd bytes."""

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e-300, float("inf"), float("nan"), -0.5),
    *("", "x", "\x00", "\x1b[31mred", "\ud800", "9" * 5000, "a" * 3000, "1e999", "~", "/dev/null"),
    *([], [[]], [None], {}, {"": None}, {"a": {"b": []}}, ["x", 1, None]),
)


def damaged(value: Any, dice: random.Random, times: int = 1) -> Any:
    """A copy of a JSON value with `times` places changed."""
    made = json.loads(json.dumps(value))
    for _ in range(times):
        made = _damage(made, dice)
    return made


def _damage(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        made = dict(value)
        action = dice.random()
        if action < 0.12:
            del made[key]
        elif action < 0.2:
            made[dice.choice(["", "extra", key + "x", "\x1b[2J"])] = made.pop(key)
        else:
            made[key] = _damage(made[key], dice)
        return made
    if isinstance(value, list) and value and dice.random() < 0.85:
        place = dice.randrange(len(value))
        action = dice.random()
        if action < 0.15:
            return value[:place] + value[place + 1 :]
        if action < 0.25:
            return [*value, *value[place:]]
        return [*value[:place], _damage(value[place], dice), *value[place + 1 :]]
    if dice.random() < 0.05:
        deep: Any = value
        for _ in range(dice.choice([50, 3000])):
            deep = [deep] if dice.random() < 0.5 else {"a": deep}
        return deep
    return dice.choice(ODD)


def as_json(value: Any) -> str:
    """JSON text, however deep and odd the value is."""
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{json.dumps(str(k))}:{as_json(v)}" for k, v in value.items()) + "}"
            if _depth(value) < 400
            else _deep_json(value)
        )
    if isinstance(value, list):
        return "[" + ",".join(map(as_json, value)) + "]" if _depth(value) < 400 else _deep_json(value)
    return json.dumps(value)


def depth_of(value: Any) -> int:
    """How many lists and objects lie within one another at most."""
    deepest, waiting = 0, [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        deepest = max(deepest, depth)
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        waiting += [(part, depth + 1) for part in inner]
    return deepest


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list | dict) and value:
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
        depth += 1
    return depth


def _deep_json(value: Any) -> str:
    opening, closing = [], []
    while isinstance(value, list | dict) and value:
        if isinstance(value, dict):
            key, value = next(iter(value.items()))
            opening.append("{" + json.dumps(str(key)) + ":")
            closing.append("}")
        else:
            value = value[0]
            opening.append("[")
            closing.append("]")
    return "".join(opening) + json.dumps(value) + "".join(reversed(closing))


def damaged_bytes(content: bytes, dice: random.Random) -> bytes:
    """A copy with bytes flipped, cut out, doubled, or put in."""
    made = bytearray(content)
    for _ in range(dice.choice([1, 1, 3])):
        if not made:
            return b"\x00"
        place = dice.randrange(len(made))
        action = dice.randrange(5)
        if action == 0:
            made[place] ^= 1 << dice.randrange(8)
        elif action == 1:
            del made[place : place + dice.choice([1, 10, 1000])]
        elif action == 2:
            made[place:place] = dice.choice(
                [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{" * 50, b"\n", b"9" * 30]
            )
        elif action == 3:
            made = made[:place]
        else:
            made[place:place] = made[place : place + 20]
    return bytes(made)
