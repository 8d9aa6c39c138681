"""Write the parts of the documentation that are made from the code: python docs/generate.py

docs/configuration.md lists every setting of every stage; the picture of the rooms in docs/architecture.md
comes from the source tree and from the order of imports that tests/docs/test_package.py holds; the table in
docs/methods/README.md comes from the recipes; what was measured of a method, on its page and in
docs/methods_measured.md, comes from docs/methods/results, which benchmarks/study/methods.py writes. A test
fails when any is not what this script writes.
"""

import ast
import sys
import textwrap
from pathlib import Path

from lightopd.config import describe
from lightopd.pipelines import RECIPES
from lightopd.pipelines.methods import list_methods, methods_table
from lightopd.pipelines.shared.metrics import COLUMNS, FIGURES
from lightopd.schemas.run import STAGES, RunConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "study"))
from method_cases import LEARNING_RATES, SETTINGS  # noqa: E402
from summary import Line, interval, read_lines  # noqa: E402

BEGIN, END = "<!-- methods: made by docs/generate.py -->\n", "<!-- end of methods -->\n"
TREE, END_OF_TREE = "<!-- rooms: made by docs/generate.py -->\n", "<!-- end of rooms -->\n"
FOLDERS = ("schemas", "lightopd", "pipelines", "cli")
"""The source, in the order in which imports are allowed."""
WIDTH = 110
"""Characters of a line of the picture."""
MEASURED = "## Measured on the tiny task\n"
"""Title of the last section of a method's page; all below it is made here."""
RESULTS = ROOT / "docs" / "methods" / "results"
"""The lines of the runs that the pages tell."""


def configuration() -> str:
    """The page of all settings."""
    parts = [
        "# Configuration",
        "",
        "Every setting of every stage, as `lightopd config show STAGE` prints it. A setting is written in",
        "YAML (`-c FILE`), as `--set a.b=1`, or as a flag where the command has one; later ones win.",
    ]
    for name, model in {**STAGES, "run": RunConfig}.items():
        parts += ["", f"## {name}", "", "```", describe(model), "```"]
    return "\n".join(parts) + "\n"


def architecture(text: str) -> str:
    """docs/architecture.md with its picture of the rooms replaced."""
    before, _, rest = text.partition(TREE)
    _, _, after = rest.partition(END_OF_TREE)
    folders = {path.parent for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    order = [*FOLDERS, *(f"lightopd/{room.replace('.', '/')}" for room in _rooms())]
    lines = [line for folder in sorted(folders, key=lambda f: _place(f, order)) for line in _room(folder)]
    rooms = " < ".join(_rooms())
    picture = f"Order of imports: `{rooms}`\n\n```\n" + "\n".join(lines) + "\n```\n"
    return before + TREE + "\n" + picture + END_OF_TREE + after


def _rooms() -> list[str]:
    """`ROOMS` of tests/docs/test_package.py, read and not imported."""
    tree = ast.parse((ROOT / "tests" / "docs" / "test_package.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "ROOMS"
        ):
            rooms: list[str] = ast.literal_eval(node.value)
            return rooms
    raise LookupError("tests/docs/test_package.py assigns no ROOMS")


def _place(folder: Path, order: list[str]) -> tuple[int, int, str]:
    name = folder.relative_to(ROOT).as_posix()
    return FOLDERS.index(name.split("/")[0]), order.index(name) if name in order else len(order), name


def _room(folder: Path) -> list[str]:
    """A folder with the first sentence of each of its modules."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    lines = [textwrap.shorten(_sentence(path), WIDTH - 25, placeholder=" ...") for path in modules]
    lines = [f"  {path.stem:<22} {line}" for path, line in zip(modules, lines, strict=True)]
    return [f"{folder.relative_to(ROOT).as_posix()}/", *lines] if lines else []


def _sentence(path: Path) -> str:
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(said.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")


def methods_page(text: str) -> str:
    """docs/methods/README.md with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + methods_table(list_methods(RECIPES / "methods")) + END + after


def metrics() -> str:
    """The page of what every printed number is."""
    parts = [
        "# Metrics",
        "",
        "What every printed number is, by its name. Means are over trained tokens unless a line says",
    ]
    parts += ["so; healthy values: [sizes, settings and questions](sizing.md#healthy-values)."]
    for title, names in (("Columns of `metrics.csv`", COLUMNS), ("Figures of the reports", FIGURES)):
        parts += ["", f"## {title}", "", "| name | is |", "|---|---|"]
        parts += [f"| `{name}` | {sentence} |" for name, sentence in names.items()]
    return "\n".join(parts) + "\n"


def method_pages() -> dict[Path, str]:
    """Every method's page with its measured section replaced, and the page of all of them."""
    runs = runs_by_recipe()
    names_of: dict[Path, list[str]] = {}
    for method in list_methods(RECIPES / "methods"):
        names_of.setdefault(ROOT / method.page, []).append(method.name)
    pages = {page: _page(page, names, runs) for page, names in names_of.items()}
    everything = [one for _, found in sorted(runs.items()) for one in found]
    parts = [ALL_METHODS.format(settings=SETTINGS), *(measured(everything) if everything else ())]
    parts += one_computation(everything)
    return pages | {ROOT / "docs" / "methods_measured.md": "\n".join(parts) + "\n"}


def runs_by_recipe() -> dict[str, list[list[Line]]]:
    """The lines of every run that has measured ones, by recipe: those of the search and of the seeds."""
    found: dict[str, list[list[Line]]] = {}
    for path in sorted(RESULTS.glob("*/*.jsonl")):
        lines = read_lines(RESULTS, path.stem)
        if "recipe" in lines[0] and any(not line["is_tuning"] for line in lines):
            found.setdefault(lines[0]["recipe"], []).append(lines)
    return found


def _page(page: Path, names: list[str], runs: dict[str, list[list[Line]]]) -> str:
    before, _, _ = page.read_text(encoding="utf-8").partition(MEASURED)
    parts = [before.rstrip("\n"), "", MEASURED]
    if found := [one for name in names for one in runs.get(name, [])]:
        only = " ".join(name for name in names if name in runs)
        command = f"    python benchmarks/study/methods.py --only {only}"
        said = f"Settings: {SETTINGS}. [All recipes](../methods_measured.md) says what the columns are."
        parts += [*measured(found), "", command, "", said, ""]
    if missing := [f"`{name}`" for name in names if name not in runs]:
        parts += [f"Not measured: {', '.join(missing)}.", ""]
    return "\n".join(parts)


ALL_METHODS = """# Every recipe on the tiny task

`make bench-methods` trains the demo's student with every recipe and keeps a line of every run in
`methods/results`, from which this page and the last section of every method's page are made.

Settings: {settings}.

Accuracy is the share of right answers, KL is KL(student, teacher) in nats per token of the student's own
answers, both on held-out prompts: means and 95 % intervals over five seeds, in which prompts, rollouts and
the order of training differ. All runs answer the same held-out prompts with the same random numbers, whose
noise no interval has in it. Every recipe has the learning rate that was best of three, on 2,000 validation
prompts with a seed of its own (the columns on the right; standard error 0.7 points, so near ones are a draw;
of equals the lowest).
Steps, batch and schedule are the same for all recipes, which their papers' are not.
"""


def _named(recipe: str, stand_in: str, changed: str, notes: dict[str, int]) -> str:
    """A recipe with the numbers of its notes, which are added to those of the table."""
    said = (stand_in, changed and f"changed in the recipe: {changed}")
    marks = [str(notes.setdefault(note, len(notes) + 1)) for note in said if note]
    return f"`{recipe}`" + (f" ({', '.join(marks)})" if marks else "")


def measured(found: list[list[Line]]) -> list[str]:
    """A table of runs, and under it what stood in for inputs that the task has not."""
    heads = [f"validation at {rate:.0e}".replace("e-0", "e-") for rate in LEARNING_RATES]
    columns = ["learning rate", "accuracy", "KL", *heads]
    [untrained] = read_lines(RESULTS, "untrained")
    before = ["", f"{untrained['accuracy']:.4f}", f"{untrained['reverse_kl_nats']:.4f}", *([""] * len(heads))]
    table = [_row("recipe", *columns), "|---" * (len(columns) + 1) + "|", _row("before training", *before)]
    notes: dict[str, int] = {}
    for lines in found:
        name = _named(lines[0]["recipe"], lines[0]["stand_in"], lines[0]["changed"], notes)
        table.append(_row(name, *_figures(lines)))
    return table + [""] * bool(notes) + [f"{number}. {note}" for note, number in notes.items()]


def one_computation(found: list[list[Line]]) -> list[str]:
    """Which recipes are the same computation on this task, as all of their runs say."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for lines in found:
        figures = sorted(
            (line["seed"], line["tuned"]["optimizer.lr"], line["accuracy"], line["reverse_kl_nats"])
            for line in lines
        )
        alike.setdefault(tuple(figures), []).append(f"`{lines[0]['arm']}`")
    groups = "; ".join(", ".join(names) for names in alike.values() if len(names) > 1)
    return ["", f"One computation on this task, to the last digit: {groups}."] if groups else []


def _figures(lines: list[Line]) -> list[str]:
    """The chosen rate, accuracy and KL over the seeds, and the search."""
    own = [line for line in lines if not line["is_tuning"]]
    [rate] = {line["tuned"]["optimizer.lr"] for line in own}
    tried = {line["tuned"]["optimizer.lr"]: f"{line['accuracy']:.4f}" for line in lines if line["is_tuning"]}
    accuracy = str(interval(line["accuracy"] for line in own))
    kl = str(interval(line["reverse_kl_nats"] for line in own))
    seeds = "" if len(own) == 5 else f" ({len(own)})"
    return [f"{rate:g}", accuracy + seeds, kl, *(tried.get(one, "") for one in LEARNING_RATES)]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    (ROOT / "docs" / "metrics.md").write_text(metrics(), encoding="utf-8")
    (ROOT / "docs" / "configuration.md").write_text(configuration(), encoding="utf-8")
    picture = ROOT / "docs" / "architecture.md"
    picture.write_text(architecture(picture.read_text(encoding="utf-8")), encoding="utf-8")
    path = ROOT / "docs" / "methods" / "README.md"
    path.write_text(methods_page(path.read_text(encoding="utf-8")), encoding="utf-8")
    for page, text in method_pages().items():
        page.write_text(text, encoding="utf-8")
