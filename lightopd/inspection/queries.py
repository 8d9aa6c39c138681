"""The named queries that come with the package: what each shows, its parameters, and its SQL.

A file of `schemas/sql/queries` begins with comments: the sentence that says what it shows, a line
`-- NAME = DEFAULT: MEANING` for each parameter, and `-- example: COMMAND`. In the SQL a parameter is `$NAME`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lightopd.errors import ConfigError

_PARAMETER = re.compile(r"^-- (\w+) = (\S+): (.+)$")
_EXAMPLE = "-- example: "

Value = int | float | str | None


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a named query."""

    name: str
    default: Value
    meaning: str


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """A query that comes with the package."""

    name: str
    purpose: str
    """What it shows, in a sentence."""
    parameters: tuple[Parameter, ...]
    example: str
    """A command line, with CACHE and RUN for the folders."""
    sql: str

    def values(self, given: Mapping[str, object]) -> dict[str, Value]:
        """A value for every parameter: those given, else the defaults; text becomes the default's type.

        Raises:
            ConfigError: there is no such parameter, or a value is of another type.
        """
        names = [parameter.name for parameter in self.parameters]
        for name in given:
            if name not in names:
                known = ", ".join(names) or "none"
                raise ConfigError(f"query {self.name} has no parameter {name!r}; it has: {known}")
        return {
            parameter.name: _value(self.name, parameter, given[parameter.name])
            if parameter.name in given
            else parameter.default
            for parameter in self.parameters
        }


def named_queries() -> dict[str, NamedQuery]:
    """Every query that comes with the package, by name."""
    folder = files("lightopd.schemas") / "sql" / "queries"
    names = sorted(file.name.removesuffix(".sql") for file in folder.iterdir() if file.name.endswith(".sql"))
    return {name: _parse(name, (folder / f"{name}.sql").read_text(encoding="utf-8")) for name in names}


def named_query(name: str) -> NamedQuery:
    """The query of this name.

    Raises:
        ConfigError: there is none.
    """
    known = named_queries()
    if name not in known:
        raise ConfigError(f"there is no query {name!r}; there are: {', '.join(known)}")
    return known[name]


def parse_assignments(words: list[str]) -> dict[str, str]:
    """`["k=5"]` as `{"k": "5"}`.

    Raises:
        ConfigError: a word has no `=`.
    """
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not equals or not name.isidentifier():
            raise ConfigError(f"{name!r} is not NAME=VALUE; write a query's parameters as k=10")
    return {name: value for name, _, value in pairs}


def _parse(name: str, sql: str) -> NamedQuery:
    head = [line for line in sql.splitlines() if line.startswith("-- ")]
    found = [match for line in head if (match := _PARAMETER.match(line))]
    (example,) = [line.removeprefix(_EXAMPLE) for line in head if line.startswith(_EXAMPLE)]
    parameters = tuple(Parameter(match[1], json.loads(match[2]), match[3]) for match in found)
    return NamedQuery(name, head[0].removeprefix("-- "), parameters, example, sql)


def _value(query: str, parameter: Parameter, given: Any) -> Value:
    kind = str if parameter.default is None else type(parameter.default)
    if given is None or given == "null":
        return None
    try:
        value: Value = kind(given)
    except (TypeError, ValueError):
        raise ConfigError(
            f"query {query}: {parameter.name} is {given!r}, a value like {parameter.default!r} is needed"
        ) from None
    return value
