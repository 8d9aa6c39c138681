"""Write the parts of the documentation that are made from the code: python docs/generate.py

docs/configuration.md lists every setting of every stage; the table of methods in README.md comes from the
recipes. A test fails when either is not what this script writes.
"""

from pathlib import Path

from lightopd.config import describe
from lightopd.objectives.methods import list_methods, methods_table
from lightopd.pipelines import RECIPES
from lightopd.schemas.run import STAGES, RunConfig

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- methods: made by docs/generate.py -->\n", "<!-- end of methods -->\n"


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


def readme(text: str) -> str:
    """README.md with its table of methods replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + methods_table(list_methods(RECIPES / "methods")) + END + after


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(configuration(), encoding="utf-8")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
