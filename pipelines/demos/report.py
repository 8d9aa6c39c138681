"""The report that a demo ends with; the student is scored too, so that both top-k are there."""

import importlib.util
from pathlib import Path

from lightopd.inspection.opened import open_cache
from lightopd.pipelines import precompute
from lightopd.schemas.configs import PrecomputeConfig

STUDENT_SIGNAL = "rollout_student"


def write_demo_report(out: Path, student: Path, top_k: int) -> str:
    """Path of the report of a finished demo, or what to install for one.

    Args:
        out: folder of the run, with `cache/` and `train/`.
        student: the model that sampled the cache.
        top_k: entries of the student at a position.
    """
    if any(importlib.util.find_spec(name) is None for name in ("altair", "vl_convert")):
        return "none; pip install 'lightopd[report]', then lightopd report " + str(out)
    asked = {
        "cache": out / "cache",
        "teacher": {"path": str(student)},
        "signal": STUDENT_SIGNAL,
        "top_k": top_k,
    }
    precompute.run(PrecomputeConfig.model_validate({**asked, "role": "self"}))
    return str(open_cache(out / "cache", runs=[out]).report(out / "report.html"))
