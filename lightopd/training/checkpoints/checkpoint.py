"""Checkpoints: a Hugging Face folder with the optimiser's state and the run's identity beside the weights.

`checkpoints/step-000050/` is complete or not there: it is written under a dot name, flushed and renamed.
It can be loaded as a model like any other; a run that resumes from it is the same run, bit by bit.
"""

import json
import logging
import re
import shlex
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue, ValidationError
from torch import nn

from lightopd.errors import TrainingError
from lightopd.files import file_sha256, json_bytes, put_folder, write_atomically
from lightopd.schemas.base import StrictModel
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.measures.best import Best
from lightopd.training.weight_files.tensor_shards import OPTIMIZER, StoredSet

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
EXPORTED_FILE = "exported.txt"
"""Beside `checkpoints/`: name of the one that the student of a finished run was made of."""
FOLDER_NAME = re.compile(r"step-(\d{6,})")


class TrainerState(StrictModel):
    """`trainer_state.json`: which run a checkpoint belongs to, and where it stands."""

    schema_version: int = 1
    """Layout version of the checkpoint folder."""
    step: int
    """Optimiser steps done."""
    recipe: dict[str, JsonValue]
    """What decides the weights: cache content, student, objective, optimiser, batch and order."""
    objective: dict[str, JsonValue] = Field({})
    """State of the objective: curriculum and running means."""
    is_stale: bool = False
    """Training ended here because the cache had gone stale."""
    num_exceeded: int = 0
    """Last steps in a row that passed a limit of staleness."""
    best: Best | None = None
    """The best measurement so far, where the best student is exported in place of the last."""
    sizes_bytes: dict[str, int] = Field({})
    """Size of every other file of the folder; a folder that lacks one is not whole."""
    sha256: dict[str, str] = Field({})
    """SHA-256 of every other file; empty in checkpoints of versions that wrote none."""


def checkpoint_folders(folder: Path, step: int) -> tuple[Path, Path]:
    """Where a checkpoint of the run's `checkpoints/` is written, and where it lies once it is whole."""
    final = checkpoint_path(folder, step)
    return folder / f".{final.name}.tmp", final


def complete_checkpoint(
    part: Path, final: Path, state: TrainerState, known: Mapping[str, str] | None = None
) -> None:
    """Write the state beside what lies in `part`, flush everything, and give the folder its name.

    Args:
        part: the folder as it was written.
        final: its name when it is whole.
        state: step and identity of the run.
        known: SHA-256 of files that other processes wrote and hashed.

    Raises:
        OSError: no space or no permission.
    """
    files = {str(file.relative_to(part)): file for file in sorted(part.rglob("*")) if file.is_file()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    left = {name: file for name, file in files.items() if name not in (known or {})}
    whole = state.model_copy(update={"sizes_bytes": sizes, "sha256": {**(known or {}), **hash_files(left)}})
    write_atomically(part / STATE_FILE, json_bytes(whole.model_dump(mode="json")))
    put_folder(part, final)


def newest_checkpoint(folder: Path) -> tuple[Path, TrainerState] | None:
    """The whole checkpoint with the most steps, and its state; None when there is none.

    A folder that is not whole is named in a warning and passed over.
    """
    for path in reversed(_checkpoints(folder)):
        state = _whole_state(path)
        if state is not None:
            return path, state
        log.warning("checkpoint %s is not whole, or not what was written, and is passed over", path)
    return None


def best_checkpoint(folder: Path, state: TrainerState, metric: str) -> tuple[Path, TrainerState]:
    """The best checkpoint of a run, which its newest one names.

    Args:
        folder: the run's `checkpoints/`.
        state: of the newest checkpoint.
        metric: what the best is wanted by.

    Raises:
        TrainingError: the run did not choose by this metric, or the best checkpoint is gone or not whole.
    """
    if state.best is None or state.best.metric != metric:
        chosen = "its last step" if state.best is None else state.best.metric
        raise TrainingError(
            f"the run in {folder.parent} ended at step {state.step} and kept its student by {chosen}, not by "
            f"{metric}; set best back, set steps to more, or choose another out folder"
        )
    path = checkpoint_path(folder, state.best.step)
    found = _whole_state(path)
    if found is None:
        raise TrainingError(
            f"checkpoint {path}, the best of the run, is gone or not whole; leave best out to export the "
            f"student of step {state.step}, or set steps to more and choose among those"
        )
    return path, found


def note_exported(folder: Path, checkpoint: Path) -> None:
    """Write down which checkpoint the run's student was made of."""
    write_atomically(folder.parent / EXPORTED_FILE, (checkpoint.name + "\n").encode())


def exported_checkpoint(folder: Path) -> tuple[Path, TrainerState] | None:
    """The checkpoint that the run's student was made of; None where none is whole, or the run is not done."""
    file = folder.parent / EXPORTED_FILE
    if not file.is_file():
        return None
    path = folder / file.read_text(encoding="utf-8").strip()
    state = _whole_state(path)
    return None if state is None else (path, state)


def known_best(folder: Path, state: TrainerState) -> Best | None:
    """The best so far, to resume with; none, with a warning, where its checkpoint is gone or not whole."""
    if state.best is None or _whole_state(checkpoint_path(folder, state.best.step)) is not None:
        return state.best
    log.warning(
        "checkpoint %s, the best so far (%s %.4g), is gone or not whole: the best is chosen among the steps "
        "from here on",
        checkpoint_path(folder, state.best.step),
        state.best.metric,
        state.best.value,
    )
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step-{step:06d}"


def prune_checkpoints(folder: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the best, and what a killed run left half written."""
    best = None if best_step is None else checkpoint_path(folder, best_step)
    old = [path for path in _checkpoints(folder)[:-keep] if path != best]
    for path in old:
        path.rename(folder / f".{path.name}.gone")  # so that no half-deleted one has a checkpoint's name
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left half written, or half deleted."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of files, several at a time."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(file_sha256, files.values()), strict=True))


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give a new optimiser the state in a checkpoint; of a sharded model, a process reads its own rows."""
    stored = StoredSet(path, OPTIMIZER)
    for name, parameter in model.named_parameters():
        if f"step/{name}" in stored:
            optimizer.state[parameter] = {
                "step": stored.whole(f"step/{name}"),
                "exp_avg": stored.like(f"exp_avg/{name}", parameter),
                "exp_avg_sq": stored.like(f"exp_avg_sq/{name}", parameter),
            }


def check_same_run(path: Path, state: TrainerState, recipe: Mapping[str, JsonValue]) -> None:
    """Refuse to resume from a checkpoint of another run.

    Raises:
        TrainingError: names every setting that differs, with both values.
    """
    before, now = _leaves(state.recipe), _leaves(recipe)
    changed = {name: now.get(name) for name in sorted({*before, *now}) if before.get(name) != now.get(name)}
    if changed:
        told = (
            f"{name} is {_short(v)}, there it was {_short(before.get(name))}" for name, v in changed.items()
        )
        raise TrainingError(
            f"checkpoint {path} belongs to another run: {'; '.join(told)}; set these back, or "
            f"{_second_run(path.parent.parent, changed)}"
        )


def _leaves(value: Any, prefix: str = "") -> dict[str, JsonValue]:
    """Single values by dotted names; the parts of a list by their places."""
    parts = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(parts, Mapping) or not parts:
        return {prefix: value}
    return {
        name: leaf
        for key, part in parts.items()
        for name, leaf in _leaves(part, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _second_run(run: Path, changed: Mapping[str, JsonValue]) -> str:
    """How both runs can be had, in words: the command that trains again on the same cache."""
    if not (run / "train.yaml").is_file():
        return "choose another out folder"
    if all(name.partition(".")[0] in FinetuneConfig.model_fields for name in changed):
        sets = [f"--set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in changed.items()]
        told = f"-c {run / 'train.yaml'} {' '.join(sets)}"
    else:
        told = "with these settings and"
    return f"train a second student on the same cache: lightopd train {told} --out {run}-2"


def _whole_state(path: Path) -> TrainerState | None:
    try:
        state = TrainerState.model_validate_json((path / STATE_FILE).read_bytes())
        is_whole = all((path / name).stat().st_size == size for name, size in state.sizes_bytes.items())
        is_whole = is_whole and hash_files({name: path / name for name in state.sha256}) == state.sha256
    except (FileNotFoundError, ValidationError):
        return None
    return state if is_whole else None


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(FOLDER_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    numbered = [(int(match.group(1)), path) for match, path in found if match]
    return [path for _, path in sorted(numbered)]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."
