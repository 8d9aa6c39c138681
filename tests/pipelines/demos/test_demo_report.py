"""What a demo ends with: the student scored as a signal of its own, and a report beside the cache."""

import importlib.util
import shutil

from hostile_caches import write_run

from lightopd.cache.store import open_cache
from lightopd.pipelines.demos.report import STUDENT_SIGNAL, write_demo_report


def test_the_students_topk_and_a_report_are_there(world, tmp_path):
    shutil.copytree(world.cache, tmp_path / "cache")
    write_run(tmp_path / "train", cache=tmp_path / "cache")
    path = write_demo_report(tmp_path, world.sft / "student", top_k=4)
    assert path == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Overlap of two top-k" in text
    assert "rollout_student: the student that sampled" in text
    assert open_cache(tmp_path / "cache").signals[STUDENT_SIGNAL].manifest.role == "self"


def test_without_the_charts_packages_it_says_how_to_get_one(world, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "altair" else found(name, *rest)
    )
    assert "pip install 'lightopd[report]'" in write_demo_report(tmp_path, tmp_path, top_k=4)
    assert not list(tmp_path.iterdir())
