"""`make demo`: a student becomes better from a cache, with no teacher alive.

The tiny teacher and the student fine-tuned on its answers ship with the package. The teacher is copied
into the run's folder, scores the student's rollouts, and is deleted before training begins.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightopd.config import load_run
from lightopd.inspection.opened import OpenedCache
from lightopd.pipelines import DEMO, RECIPES
from lightopd.pipelines import run as pipeline
from lightopd.pipelines.demos.report import write_demo_report
from lightopd.pipelines.shared.reports import Report

QUERIES = ("worst_tokens", "gap_by_position", "lengths")


def run(
    out: Path,
    *,
    engine: str | None,
    seed: int,
    from_base: bool,
    told: Callable[[Report], None],
    shown: Callable[[str, list[dict[str, Any]]], None],
) -> str:
    """Run the demo's pipeline; its last line, JSON with accuracy before, after, of the teacher, and seconds.

    Args:
        out: folder of the run.
        engine: engine kind of sampling and scoring; None takes the recipe's.
        seed: of prompts, sampling and training.
        from_base: fine-tune the untrained student on the teacher's answers first (minutes longer).
        told: hears each stage's report.
        shown: hears the name and the rows of each SQL query.
    """
    started_s = time.monotonic()
    teacher = out / "teacher"
    shutil.copytree(DEMO / "teacher", teacher, dirs_exist_ok=True)
    files = ["demo", "demo_from_base"] if from_base else ["demo"]
    config = load_run(files, _settings(engine, seed), _models(out, from_base), RECIPES)

    def after_each(report: Report) -> None:
        told(report)
        if report.stage == "precompute":
            for name in QUERIES:
                shown(name, OpenedCache(out / "cache").query(name).rows()[:8])

    def before_training() -> None:
        shutil.rmtree(teacher)

    report = pipeline.run(config, told=after_each, before_training=before_training)
    student = out / "sft" / "student" if from_base else DEMO / "student"
    page = write_demo_report(out, student, top_k=4)
    return json.dumps(
        {
            "accuracy_before": report.figures["eval_before_avg_at_k"],
            "accuracy_after": report.figures["eval_after_avg_at_k"],
            "accuracy_teacher": report.figures["eval_teacher_avg_at_k"],
            "seconds": round(time.monotonic() - started_s, 1),
            "report": page,
        }
    )


def _settings(engine: str | None, seed: int) -> list[str]:
    sets = [f"prompts.seed={seed}", f"rollout.sampling.seed={seed}", f"train.seed={seed}"]
    if engine == "vllm":  # its CPU kernels have no head size of 24, the student's; the teacher's is 32
        sets += ["precompute.engine.kind=vllm"]
    elif engine:
        sets += [f"{stage}.engine.kind={engine}" for stage in ("rollout", "precompute", "eval")]
    return sets


def _models(out: Path, from_base: bool) -> dict[str, Any]:
    student = DEMO / ("base" if from_base else "student")
    return {"out": str(out), "teacher": str(out / "teacher"), "student": str(student)}
