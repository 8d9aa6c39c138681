"""One run of the study, from the stages that users run: cache, training, evaluation, its figures."""

import csv
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import torch
from arms import Arm, Cell, read_regime, settings_of
from measures import extrapolated_kl, gradient_gap
from summary import Line, alone_at

import lightopd
from lightopd.cache.index import query
from lightopd.config import build, build_run, merged
from lightopd.files import write_atomically
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.pipelines import evaluate, precompute, rollout, rounds, sft, train
from lightopd.pipelines.shared.reports import Report
from lightopd.prompts.load import load_prompts
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import (
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from lightopd.schemas.run import RunConfig

VALIDATION = {"split": "train", "seed": 900}
"""Laid over the held-out prompts for runs that choose a setting: a draw of its own of training prompts."""
OF_TRAINING = (
    "w_mean",
    "w_std",
    "ess",
    "chi2",
    "overlap",
    "log_ratio",
    "log_ratio_lost",
    "loss",
    "tokens",
    "tokens_per_second",
)
OF_CURVE = ("step", "loss", "w_mean", "ess", "chi2", "overlap", "log_ratio", "log_ratio_lost", "avg_at_k")
CURVE_POINTS = 10
SUPPORT = Path(__file__).parents[1] / "support"
OF_CACHE = ("gap_nats", "response_tokens", "bytes_per_token")


QUICK: Line = {
    "prompts": {"count": 64},
    "eval_prompts": {"count": 64},
    "train": {"steps": 2, "batch_sequences": 16},
}
"""Laid over a run that only shows that it runs."""
QUICK_ROUNDS: Line = {"rounds": {"steps": 2, "prompts_per_round": 16}, "train": {"steps": 1}}


def choose_device(name: str) -> None:
    """See that engines and trainings, which take a GPU where torch sees one, run on the device asked for.

    Raises:
        SystemExit: a GPU was asked for, and there is none.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here; leave it out to run on the CPU")


def run_of(arm: Arm, cell: Cell, work: Path, over: Line | None = None) -> RunConfig:
    """The cell as a run file with its models and folders, `over` laid on top."""
    regime = read_regime(cell.regime)
    settings = merged(settings_of(arm, cell), over or {})
    if over and arm.kind == "rounds":
        settings = merged(settings, QUICK_ROUNDS)
    if cell.is_tuning:
        settings = merged(settings, {"eval_prompts": regime.get("validation", VALIDATION)})
    own = {
        "teacher": str(models.teacher(work, regime[arm.scorer])),
        "student": str(models.student(work, cell.regime)),
        "out": str(work / "runs" / cell.key),
    }
    return build_run(merged(settings, own))


def current_device() -> str:
    """Where engines and trainings run in this process: on the GPU where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def provenance() -> Line:
    """What kind of machine runs here, with which versions; no name of a machine and no folder."""
    machine = {"architecture": platform.machine(), "processor": _processor(), "num_cpus": os.cpu_count()}
    if current_device() == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"lightopd": lightopd.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"device": current_device(), "machine": machine, "versions": versions}


def _processor() -> str:
    """The processor's model as Linux names it, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
    return next(named, platform.processor())


def identity(run: RunConfig, arm: Arm, device: str) -> str:
    """Hash of what decides a cell's figures: settings, models, and a device that is not the CPU."""
    settings = run.model_dump(mode="json", exclude={"out", "teacher", "student"})
    settings["train"].pop("micro_batch_tokens", None)  # decides the rounding and no more
    weights = [fingerprint_model(ModelConfig(path=one.path)).identity for one in (run.teacher, run.student)]
    return canonical_hash([arm.kind, arm.signals, settings, weights, *_but_cpu(device)])


def _but_cpu(device: str) -> list[str]:
    return [] if device == "cpu" else [device]


def measure(arm: Arm, cell: Cell, run: RunConfig, work: Path) -> Line:
    """Run a cell and give its line; what it wrote is deleted, but for the cache that others share."""
    shutil.rmtree(run.out, ignore_errors=True)
    num_texts = read_regime(cell.regime).get("texts", 0) if cell.seed == 0 else 0
    trained = TRAININGS[arm.kind](arm, run, work)
    line = {
        "key": cell.key,
        "identity": identity(run, arm, current_device()),
        **{"arm": cell.arm, "regime": cell.regime, "seed": cell.seed},
        **{"grid": dict(cell.grid), "tuned": dict(cell.tuned), "is_tuning": cell.is_tuning},
        **trained,
        **evaluated(run, trained_model(arm, run), is_tuning=cell.is_tuning, num_texts=num_texts),
        **(measured_besides(arm, cell, run, work) if not cell.is_tuning else {}),
        **provenance(),
    }
    shutil.rmtree(run.out, ignore_errors=True)
    return line


def evaluated(run: RunConfig, model: Path, *, is_tuning: bool, num_texts: int = 0) -> Line:
    """Accuracy at temperature 1 and greedily, KL to the teacher on the model's own answers, some texts."""
    settings = run.settings("eval_after") | {"model": str(model), "out": run.out / "eval"}
    sampled = evaluate.run(build(EvalConfig, settings)).figures
    figures = {"accuracy": sampled["avg_at_k"], "standard_error": sampled["standard_error"]}
    figures |= {"reverse_kl_nats": sampled["reverse_kl_nats"], "forward_kl_nats": sampled["forward_kl_nats"]}
    if is_tuning:  # greedy answers choose nothing
        return figures
    greedy = merged(settings, {"sampling": {"temperature": 0.0}, "teacher": None, "out": run.out / "greedy"})
    figures["greedy_accuracy"] = evaluate.run(build(EvalConfig, greedy)).figures["avg_at_k"]
    return figures | ({"texts": texts(run.out / "greedy" / "answers", num_texts)} if num_texts else {})


def texts(answers: Path, count: int) -> list[Line]:
    """The first prompts and their answers, to be read."""
    sql = f"select prompt_text, response_text from rollouts order by prompt_id limit {count}"
    return query(answers, sql).to_pylist()


def trained_model(arm: Arm, run: RunConfig) -> Path:
    """What is evaluated."""
    there = {"teacher": Path(run.teacher.path), "untrained": Path(run.student.path)}
    return there.get(arm.kind, run.out / "train" / "student")


def measured_besides(arm: Arm, cell: Cell, run: RunConfig, work: Path) -> Line:
    """What one question alone asks for."""
    models = [Path(one.path) for one in (run.teacher, run.student)]
    trained = trained_model(arm, run)
    factor = dict(cell.grid).get("train.objective.extrapolate.factor")
    if isinstance(factor, int | float):
        return {
            "extrapolated_kl_nats": extrapolated_kl(trained, *models, factor, run.out / "eval" / "answers")
        }
    if "gradient_gap" in arm.measures:
        place, _ = cache_of(arm, run, work)
        return gradient_gap(trained, *models, place)._asdict()
    return {}


def cache_of(arm: Arm, run: RunConfig, work: Path) -> tuple[Path, Line]:
    """A cell's cache, shared by all that sample and score alike, and what it cost when it was made."""
    sampling, scoring = run.settings("rollout"), run.settings("precompute")
    named = {name: value for name, value in scoring.items() if name != "cache"}
    sampled, device = sampling | {"cache": ""}, _but_cpu(current_device())

    def sample(place: Path) -> Line:
        begun_s = time.process_time()
        rollout.run(build(RolloutConfig, sampling | {"cache": place}))
        return {"rollout_seconds": round(time.process_time() - begun_s, 2)}

    def score(place: Path) -> Line:
        rollouts, cost = made_once(work / "rollouts" / _hash([sampled, *device]), sample)
        shutil.copytree(rollouts, place)
        begun_s = time.process_time()
        figures = precompute.run(build(PrecomputeConfig, scoring | {"cache": place})).figures
        found = {name: figures[name] for name in OF_CACHE if name in figures} | cost
        found |= {"score_seconds": round(time.process_time() - begun_s, 2)}
        for name, own in arm.signals.items():
            beside = {"cache": place, "teacher": run.student, "signal": name, **own}
            precompute.run(build(PrecomputeConfig, beside))
        return found

    return made_once(work / "caches" / _hash([sampled, named, arm.signals, *device]), score)


def made_once(place: Path, make: Callable[[Path], Line]) -> tuple[Path, Line]:
    """A folder that `make` fills, and what it said of it; another process waits until it is there.

    One that was not made to its end is begun again, so that its cost is that of the whole.
    """
    said = place.with_suffix(".json")
    with alone_at(place):
        if not said.exists():
            shutil.rmtree(place, ignore_errors=True)
            write_atomically(said, json.dumps(make(place)).encode())
    return place, json.loads(said.read_text())


def _hash(value: Any) -> str:
    return canonical_hash(_plain(value))[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return (
        value.model_dump(mode="json")
        if hasattr(value, "model_dump")
        else (str(value) if isinstance(value, Path) else value)
    )


def _nothing(_arm: Arm, _run: RunConfig, _work: Path) -> Line:
    return {}


def _offline(arm: Arm, run: RunConfig, work: Path) -> Line:
    place, cost = cache_of(arm, run, work)
    started_s = time.process_time()
    report = train.run(build(TrainConfig, run.settings("train") | {"cache": place}))
    return cost | _of_training(report, started_s) | {"curve": curve(run.out / "train" / "metrics.csv")}


def _rounds(_arm: Arm, run: RunConfig, _work: Path) -> Line:
    started_s = time.process_time()
    report = rounds.run(run.model_copy(update={"eval_prompts": None}))
    shutil.copytree(run.out / "student", run.out / "train" / "student")
    return _of_training(report, started_s)


def _more_sft(_arm: Arm, run: RunConfig, _work: Path) -> Line:
    """The teacher answers the prompts of the rollouts, and the student learns from these as before."""
    own = run.train
    fitted = {name: own[name] for name in ("steps", "batch_sequences", "optimizer", "seed") if name in own}
    settings = {
        "prompts": run.prompts,
        "teacher": run.teacher,
        "student": run.student,
        "out": run.out / "train",
    }
    settings |= {name: run.rollout[name] for name in ("sampling", "engine", "shard_rollouts")}
    started_s = time.process_time()
    return _of_training(sft.run(build(SftConfig, settings | {"finetune": fitted})), started_s)


def _trl(_arm: Arm, run: RunConfig, _work: Path) -> Line:
    """The same training by a peer, in an environment of its own."""
    trained = build(TrainConfig, run.settings("train"))
    settings = {
        **{
            "student": run.student.path,
            "teacher": run.teacher.path,
            "out": str(run.out / "train" / "student"),
        },
        "prompts": [prompt.text for prompt in load_prompts(run.prompts)],
        **{"steps": trained.steps, "batch": trained.batch_sequences, "seed": trained.seed},
        "max_tokens": run.rollout["sampling"]["max_tokens"],
        **trained.optimizer.model_dump(mode="json"),
    }
    run.out.mkdir(parents=True)
    asked = run.out / "trl.json"
    asked.write_text(json.dumps(settings))
    python = _printed([sys.executable, str(SUPPORT / "peers.py")])
    return dict(json.loads(_printed([python, str(SUPPORT / "trl_run.py"), str(asked)])))


def _printed(command: list[str]) -> str:
    """The last line that a command prints."""
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return found.stdout.splitlines()[-1]


TRAININGS = {
    "offline": _offline,
    "rounds": _rounds,
    "sft": _more_sft,
    "trl": _trl,
    "teacher": _nothing,
    "untrained": _nothing,
}
"""How each kind of arm makes the model that is evaluated."""


def _of_training(report: Report, started_s: float) -> Line:
    """Figures of a training, and its seconds of a core: other work on the machine is not in them."""
    seconds = round(time.process_time() - started_s, 2)
    return {"train_seconds": seconds, **{n: report.figures[n] for n in OF_TRAINING if n in report.figures}}


def curve(metrics: Path) -> list[Line]:
    """At most `CURVE_POINTS` steps of a training, evenly, with the measures of drift and accuracy."""
    read = csv.DictReader(metrics.read_text().splitlines())
    rows = [
        {name: float(row[name]) for name in OF_CURVE if row.get(name, "nan") not in ("", "nan")}
        for row in read
    ]
    every = max(1, len(rows) // CURVE_POINTS)
    return [row for place, row in enumerate(rows, 1) if place % every == 0 or "avg_at_k" in row]
