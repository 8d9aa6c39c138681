"""docs/study.md and its pictures, from the results and from the answers that were written to them.

python benchmarks/study/page.py        needs the extra `report` for the pictures
"""

import html
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from arms import Arm, last_parts, read_arms, read_regime
from jinja2 import Environment, StrictUndefined
from summary import Line, Place, accuracies_before, figures, measured, read_lines
from tables import COLUMNS, best_first, joined, map_table, overlap_table, table

from lightopd.files import write_atomically
from lightopd.pipelines import RECIPES
from lightopd.pipelines.methods import find_method

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "study" / "results"
ANSWERS = ROOT / "docs" / "study" / "answers.yaml"
PAGE = ROOT / "docs" / "study.md"
IMAGES = ROOT / "docs" / "images"
METHODS = ROOT / "docs" / "methods" / "results"
ON_ONE_CACHE = (
    "lightning_opd",
    "recommended_topk_reverse_kl",
    "recommended_baseline_ratio",
    "scope",
    "uni_opd",
    "tip",
    "renio",
    "prune_opd",
    "decoupling_student_fkl",
    "decoupling_teacher_rkl",
    "decoupling_mix",
    "vopd",
)
"""Recipes of the ninth question, with the plain loss and the recommended ones to compare with;
`decoupling_student_rkl` is the second of these."""
ON_ONE_MACHINE = "large_gap"
"""The regime whose costs were measured beside each other."""
PICTURES = {1: "arms", 2: "map", 6: "drift"}
RANKED = (1, 4, 5)
"""Questions whose arms stand in the order of their accuracy."""

QUESTIONS = {
    1: "Does offline distillation work?",
    2: "Where does the plain loss gain, where does it lose?",
    3: "What does it cost?",
    4: "Does the teacher have to be the one of the fine-tuning?",
    5: "Which direction of KL, live, offline, or with one refresh?",
    6: "How far does the student drift?",
    7: "Past the teacher: ExOPD",
    8: "How many bytes does the signal need?",
    9: "The methods of the literature on one cache",
}


def page(results: Path = RESULTS, images: Path = IMAGES) -> str:
    """The whole page."""
    answers = written(results)
    arms = read_arms()
    lines = {name: read_lines(results, name) for name in arms}
    parts = [answers["title"], *setting(lines), *answers_first(answers)]
    for number, title in QUESTIONS.items():
        own = {name: arm for name, arm in arms.items() if number in arm.questions}
        parts += [f"## {number}. {title}", answers["questions"][number], *picture(number, images)]
        parts += tables(number, own, lines)
    return "\n\n".join([*parts, answers["limits"], *searches(arms, lines)]).replace("\n\n\n", "\n\n") + "\n"


def written(results: Path) -> dict[str, Any]:
    """The texts, with the figures that they name filled in from the lines."""
    told = figures(results, "large_gap") | {"of_recipes": figures(METHODS, "tiny")["figure"]}
    template = Environment(undefined=StrictUndefined).from_string(ANSWERS.read_text())
    return dict(yaml.safe_load(template.render(told)))


def picture(number: int, images: Path) -> Iterator[str]:
    """The picture of a question, where there is one."""
    name = f"study-{PICTURES.get(number)}.svg"
    if (images / name).exists():
        yield f"![{QUESTIONS[number]}](images/{name})"


def answers_first(answers: dict[str, Any]) -> list[str]:
    """What the page says before all tables."""
    return ["## In short", answers["short"]]


def setting(lines: dict[str, list[Line]]) -> list[str]:
    """What was run, and for how long."""
    found = [line for own in lines.values() for line in own]
    hours = sum(line["seconds"] for line in found) / 3600
    best = {line["regime"]: f"{line['accuracy']:.4f}" for line in lines["teacher"]}
    rows = [
        f"| `{name}` | {best.get(name, '')} | {line['accuracy']:.4f} | {line['greedy_accuracy']:.4f} |"
        f" {line['reverse_kl_nats']:.3f} | {read_regime(name)['about']} |"
        for name in regimes(found)
        for line in lines["untrained"]
        if line["regime"] == name
    ]
    head = [
        "| regime | teacher's accuracy | student's | greedily | KL to the teacher, nats | what it is |",
        "|---|---|---|---|---|---|",
    ]
    ran = (
        f"{len(found):,} runs, {hours:.1f} hours of runs, those that chose a setting included; some ran "
        "beside each other."
    )
    return ["## Setting", "\n".join([*head, *rows]), ran, *machines(found)]


def machines(lines: list[Line]) -> Iterator[str]:
    """How many runs were made on which kind of machine and with which versions, where they recorded it."""
    known = Counter(
        (machine_in_words(line), ", ".join(f"{name} {one}" for name, one in line["versions"].items()))
        for line in lines
        if "machine" in line
    )
    if known:
        rows = [
            f"| {count} | {machine} | {versions} |" for (machine, versions), count in sorted(known.items())
        ]
        yield "\n".join(["| runs | machine | versions |", "|---|---|---|", *rows])
    if earlier := len(lines) - known.total():
        yield f"{earlier} earlier runs recorded neither machine nor versions."


def machine_in_words(line: Line) -> str:
    """The kind of machine of a run, its device last."""
    machine = line["machine"]
    device = f"on the GPU, {machine['gpu']}" if "gpu" in machine else f"on the {line['device'].upper()}"
    return f"{machine['processor']} ({machine['architecture']}), {machine['num_cpus']} CPUs, {device}"


def regimes(lines: Iterable[Line]) -> list[str]:
    """The regimes that have lines, in order."""
    return sorted({line["regime"] for line in lines})


def tables(number: int, arms: dict[str, Arm], lines: dict[str, list[Line]]) -> Iterator[str]:
    """A table for each regime that has arms of the question's own, and what was not run.

    An arm's own question is its first; what a regime has of others' stands under theirs.
    """
    if number == 2:
        for name, arm in arms.items():
            yield from maps(name, arm, lines[name])
        return
    if number == 9:
        yield from on_one_cache()
        return
    found = [place for name in arms for place in measured(lines[name])]
    missing = []
    for regime in sorted({regime for arm in arms.values() for regime in arm.regimes}):
        if number == 3 and regime != ON_ONE_MACHINE:
            continue
        here = [(place, own) for place, own in found if place[1] == regime]
        if any(arms[place[0]].questions[0] == number for place, _ in here) or number == 3:
            yield f"**`{regime}`**"
            yield table(COLUMNS[number], best_first(here) if number in RANKED else here, arms)
            yield made_by(regime, [place[0] for place, _ in here], arms)
        ran = {place[0] for place, _ in here}
        names = [f"`{name}`" for name, arm in arms.items() if regime in arm.regimes and name not in ran]
        missing += [f"in `{regime}` {', '.join(names)}"] if names else []
    if number == 1:
        yield from texts(arms, lines)
    if number == 6:
        yield "How far a student moved from who sampled, and what it gained, in all measured offline runs."
        yield overlap_table(overlaps(lines))
    if missing:
        yield f"Not run: {'; '.join(missing)}."
    if not arms:
        yield "Not run: no arm is there yet."


def maps(name: str, arm: Arm, lines: list[Line]) -> Iterator[str]:
    """The map of a loss in each of its regimes."""
    for regime in arm.regimes:
        places = [(place, own) for place, own in measured(lines) if place[1] == regime]
        yield f"**{arm.title}, `{regime}`**" if places else f"Not run: `{name}` in `{regime}`."
        if places:
            yield map_table(places)
            yield made_by(regime, [name], {name: arm})


def overlaps(lines: dict[str, list[Line]]) -> Iterator[tuple[str, float, float]]:
    """Of every measured offline run the kind of its target, its last overlap and the points gained."""
    before = accuracies_before(lines["untrained"])
    for name, arm in read_arms().items():
        if arm.kind != "offline" or arm.measures or not arm.method:
            continue
        kind = find_method(RECIPES / "methods", arm.method).objective.terms[0].target.kind
        for place, own in measured(lines[name]):
            if place[1] in before:
                gained = ((line["overlap"], 100 * (line["accuracy"] - before[place[1]])) for line in own)
                yield from ((kind, *one) for one in gained)


def made_by(regime: str, names: Iterable[str], arms: dict[str, Arm]) -> str:
    """The command that makes the runs of a table, those that it takes settings from included."""
    needed = dict.fromkeys(one for name in names for one in (arms[name].tuned_like, name) if one)
    return f"Made by `python benchmarks/study --regime {regime} --only {' '.join(needed)}`."


def texts(arms: dict[str, Arm], lines: dict[str, list[Line]]) -> Iterator[str]:
    """What the text looks like: greedy answers to the same prompts, in the regimes that keep some."""
    kept = [(arms[name].title, line) for name in arms for line in lines[name] if "texts" in line]
    for regime in regimes(line for _, line in kept):
        own = [(title, line["texts"]) for title, line in kept if line["regime"] == regime]
        for place, asked in enumerate(own[0][1]):
            rows = [f"| {title} | {in_a_cell(answers[place]['response_text'])} |" for title, answers in own]
            head = [f"| `{regime}`, greedily | {in_a_cell(asked['prompt_text'])} |", "|---|---|"]
            yield "\n".join([*head, *rows])


def in_a_cell(text: str) -> str:
    """A model's text as one cell of a table, with nothing of it read as Markdown or HTML."""
    quoted = html.escape(text.strip()).replace("|", "&#124;").replace("\n", "<br>")
    return "".join(f"\\{sign}" if sign in "\\`*_[]$~" else sign for sign in quoted)


def on_one_cache() -> Iterator[str]:
    """The methods of the ninth question, as benchmarks/study/methods.py measured them with all others."""
    places = [place for name in ON_ONE_CACHE for place in measured(read_lines(METHODS, name))]
    titles = {place[0]: Arm(title=place[0], questions=(9,)) for place, _ in places}
    if places:
        yield table(COLUMNS[9], best_first(places), titles)
        only = " ".join(name for name in ON_ONE_CACHE if name in titles)
        yield f"Made by `python benchmarks/study/methods.py --only {only}`."
    missing = [f"`{name}`" for name in ON_ONE_CACHE if name not in titles]
    if missing:
        yield f"Not run: {', '.join(missing)}."


def searches(arms: dict[str, Arm], lines: dict[str, list[Line]]) -> Iterator[str]:
    """The validation accuracy of every setting that was tried."""
    yield "## The search"
    yield (
        "Accuracy on the validation prompts (2,000; in `smollm2` 48), one seed that no measured run has; the "
        "highest was taken. Where the numbers are KL to the teacher, in nats, the lowest was."
    )
    borrowed = [f"`{name}` that of `{arm.tuned_like}`" for name, arm in arms.items() if arm.tuned_like]
    yield f"No search of their own: these take the setting of another arm: {', '.join(borrowed)}."
    tried = [line for name in arms for line in lines[name] if line["is_tuning"]]
    rates = sorted({value for line in tried for value in line["tuned"].values()})
    places: dict[Place, dict[Any, float]] = {}
    for line in tried:
        place = line["arm"], line["regime"], tuple(line["grid"].items())
        figure = read_regime(line["regime"]).get("lowest", "accuracy")
        places.setdefault(place, {})[next(iter(line["tuned"].values()))] = line[figure]
    head = ["arm", "regime", *(f"{value:g}" for value in rates)]
    rows = []
    for (arm, regime, grid), found in places.items():
        settings = last_parts(dict(grid)).items()
        name = f"`{arm}`" + "".join(f", {setting} {value:g}" for setting, value in settings)
        rows.append(
            [name, f"`{regime}`", *(f"{found[value]:.4f}" if value in found else "" for value in rates)]
        )
    yield joined(head, rows)


def write_page(results: Path = RESULTS, docs: Path = PAGE.parent) -> None:
    """Write the page and its pictures anew; other processes may do so at the same moment."""
    from pictures import write_pictures

    arms = read_arms()
    write_pictures(docs / IMAGES.name, arms, {name: read_lines(results, name) for name in arms})
    write_atomically(docs / PAGE.name, page(results, docs / IMAGES.name).encode(), shared=True)


if __name__ == "__main__":
    write_page()
