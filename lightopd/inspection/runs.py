"""What a run left on disk: metrics, settings, reports. Read while it trains as well."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from lightopd.errors import InputError
from lightopd.files import looks_like_url
from lightopd.schemas.manifest import CACHE_MANIFEST
from lightopd.training.measures.metrics_rows import read_metrics

METRICS = pa.schema(
    [("run", pa.string()), ("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())]
)
"""One row for each number that was measured at a step."""


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """One run of the train stage, finished or not."""

    name: str
    """Its folder's name, or its parent's where the folder is called `train`; unique in a report."""
    path: Path
    metrics: tuple[dict[str, float], ...]
    """One dict for each step; NaN where a number was not measured."""
    settings: dict[str, Any]
    """Its `train.yaml`; empty when there is none yet."""
    report: dict[str, Any]
    """Its `train.report.json`; empty while it runs."""

    @property
    def is_finished(self) -> bool:
        """Whether the stage has left its report."""
        return bool(self.report)

    @property
    def limits(self) -> dict[str, float]:
        """The staleness limits that the run was held to."""
        found = self.settings.get("staleness") or {}
        return {name: value for name, value in found.items() if isinstance(value, float | int)}


def read_runs(folders: Iterable[Path]) -> list[TrainedRun]:
    """Runs of the train stage: each folder is one, or a whole run with `train/` or rounds in it.

    Raises:
        InputError: a folder holds no run; the message names it.
    """
    found: dict[Path, TrainedRun] = {}
    for folder in folders:
        places = [place for place in _places(folder) if place.resolve() not in found]
        for place in places:
            found[place.resolve()] = _read_run(place)
    return _named_apart(list(found.values()))


def find_cache(folder: Path) -> tuple[Path, list[Path]]:
    """The cache that a folder is or was trained on, and the runs that it is: (cache, run folders).

    Raises:
        InputError: the folder is neither a cache nor a run, or its cache is gone.
    """
    if (folder / CACHE_MANIFEST).is_file() or not folder.is_dir():
        return folder, []
    places = _trained_in(folder)
    caches = [folder / "cache", *(Path(str(_settings(place).get("cache"))) for place in reversed(places))]
    for cache in caches:
        if (cache / CACHE_MANIFEST).is_file() or looks_like_url(cache):
            return cache, [folder] if places else []
    if not places:
        raise InputError(
            f"{folder} is neither a cache nor a run; name a folder made by `lightopd rollout`, `train` or "
            "`run`"
        )
    raise InputError(
        f"{folder} was trained on {caches[-1]}, which is not there; name the cache first, then the run"
    )


def metrics_table(runs: Iterable[TrainedRun]) -> pa.Table:
    """Every measured number of every run, long: run, step, name, value."""
    rows = [
        {"run": run.name, "step": int(line["step"]), "name": name, "value": value}
        for run in runs
        for line in run.metrics
        for name, value in line.items()
        if name != "step" and value == value
    ]
    return pa.Table.from_pylist(rows, schema=METRICS)


def read_report(folder: Path, stage: str) -> dict[str, Any]:
    """A stage's report, empty when it has left none."""
    try:
        plain = json.loads((folder / f"{stage}.report.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return plain if isinstance(plain, dict) else {}


def _places(folder: Path) -> list[Path]:
    places = _trained_in(folder)
    if not places:
        raise InputError(
            f"{folder} holds no run: neither train.yaml nor metrics.csv is in it or in its train/; give the "
            "--out folder of `lightopd train` or `lightopd run`"
        )
    return places


def _trained_in(folder: Path) -> list[Path]:
    """The folder itself where it is a run of the train stage, else its `train/` and those of its rounds."""
    if _is_run(folder):
        return [folder]
    repeated = (*sorted(folder.glob("round-*/train")), *sorted(folder.glob("phase-*/train")))
    return [place for place in (folder / "train", *repeated) if _is_run(place)]


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.csv").is_file() or (folder / "train.yaml").is_file()


def _read_run(folder: Path) -> TrainedRun:
    metrics = tuple(read_metrics(folder / "metrics.csv"))
    absolute = folder.resolve()
    name = absolute.parent.name if absolute.name == "train" else absolute.name
    return TrainedRun(name, folder, metrics, _settings(folder), read_report(folder, "train"))


def _settings(folder: Path) -> dict[str, Any]:
    """The run's `train.yaml`; empty when there is none yet."""
    path = folder / "train.yaml"
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML ({error}); copy it again") from None
    return plain if isinstance(plain, dict) else {}


def _named_apart(runs: list[TrainedRun]) -> list[TrainedRun]:
    """Runs of one name get their number behind it."""
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1
        else TrainedRun(
            f"{run.name} ({names[: place + 1].count(run.name)})",
            *(run.path, run.metrics, run.settings, run.report),
        )
        for place, run in enumerate(runs)
    ]
