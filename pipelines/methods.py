"""The recipes as methods: listed, shown, and checked against a cache.

A recipe is a part of a train config with three comments at its top: `Title (paper)`, one sentence, and
the path of its page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightopd.config import build, read_yaml
from lightopd.errors import ConfigError
from lightopd.objectives.base.part import Needs
from lightopd.objectives.preparation.serving import CacheFacts, missing, warnings_of
from lightopd.objectives.requirements import needs
from lightopd.schemas.objectives.objective import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class Method:
    """A recipe."""

    name: str
    """File name without suffix; `lightopd train -c methods/NAME` uses it."""
    title: str
    paper: str
    sentence: str
    """What it does."""
    page: str
    """Path of its page, from the repository's root."""
    path: Path
    settings: dict[str, Any]
    """The whole recipe, as written."""
    objective: ObjectiveConfig
    needs: Needs


def list_methods(folder: Path) -> tuple[Method, ...]:
    """Every recipe in a folder, sorted by name.

    Raises:
        ConfigError: a recipe that is broken, or has no title, sentence and page at its top.
    """
    return tuple(read_method(path) for path in sorted(folder.glob("*.yaml")))


def find_method(folder: Path, name: str) -> Method:
    """The recipe of that name.

    Raises:
        ConfigError: there is none, or it is broken.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(f"no method {name}; there are: {known}")
    return read_method(path)


def read_method(path: Path) -> Method:
    """Read one recipe file; see `list_methods`."""
    lines = path.read_text(encoding="utf-8").splitlines()[:3]
    head = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    if len(head) != 3 or not head[0].endswith(")") or not head[2].endswith(".md"):
        raise ConfigError(f"{path}: begin with three comments: title (paper), one sentence, path of the page")
    title, _, paper = head[0].removesuffix(")").partition(" (")
    settings = read_yaml(str(path))
    objective = build(ObjectiveConfig, settings.get("objective", {}))
    return Method(path.stem, title, paper, head[1], head[2], path, settings, objective, needs(objective))


def needs_lines(wanted: Needs) -> list[str]:
    """What a method needs, in words, one line each."""
    lines = [
        f"signal {name}" + (" with top-k" if name in wanted.topk else " on the sampled tokens")
        for name in wanted.signals
    ]
    lines += [f"column {name}" for name in wanted.columns]
    lines += [f"text {name}, of lightopd rewrite" for name in (*wanted.texts, *wanted.chunks)]
    lines += ["several rollouts of each prompt"] * wanted.groups
    lines += ["a pass over the cache before the first step"] * wanted.prepared
    lines += ["a second forward pass at each step"] * wanted.step_sums
    return lines or ["nothing beyond the rollouts"]


def check_method(method: Method, facts: CacheFacts) -> tuple[list[str], list[str]]:
    """What the cache lacks for a method, and warnings; both empty when it can serve it."""
    return missing(method.objective, facts), [*warnings_of(method.objective), *facts.remarks]


def methods_table(methods: tuple[Method, ...]) -> str:
    """The methods as a Markdown table, for a page beside theirs."""
    rows = ["| method | paper | what it does | needs |", "|---|---|---|---|"]
    for method in methods:
        signals = ", ".join(
            name + (" (top-k)" if name in method.needs.topk else "") for name in method.needs.signals
        )
        texts = (f"text {name}" for name in (*method.needs.texts, *method.needs.chunks))
        columns = ", ".join((*method.needs.columns, *texts))
        wanted = "; ".join(part for part in (signals, columns) if part) or "rollouts only"
        rows.append(
            f"| [{method.name}]({Path(method.page).name}) | {method.paper} | {method.sentence} | {wanted} |"
        )
    return "\n".join(rows) + "\n"
