"""What run files of tests have in common."""

from pathlib import Path
from typing import Any


def models_of(world: Any, out: Path) -> dict[str, str]:
    """The world's teacher, student and prompts, and where a run of them goes."""
    student, prompts = world.sft / "student", world.root / "prompts.jsonl"
    found = {"out": out, "teacher": world.teacher, "student": student, "prompts": prompts}
    return {name: str(path) for name, path in found.items()}
