"""The study is a script: its modules are found beside it."""

import sys
from pathlib import Path

import pytest
from scripts import script

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))


@pytest.fixture
def study(tmp_path, monkeypatch):
    module = script("benchmarks/study/__main__.py")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module
