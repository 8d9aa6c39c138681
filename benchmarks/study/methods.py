"""Every recipe on the demo's task, each at the best of three learning rates, with five seeds.

    python benchmarks/study/methods.py                  # all recipes that have no results yet
    python benchmarks/study/methods.py --only opsd      # one recipe, and the caches that are missing
    python benchmarks/study/methods.py --seeds 3 --minutes 60

A run is one line of docs/methods/results/tiny/NAME.jsonl, from which docs/generate.py makes the pages; what
is finished is not run again, and several of these commands, given at once, share the runs. Seeds decide the
prompts, the rollouts and the order of training. Caches are made by the real stages in runs/methods and kept.
Steps, batch and schedule are the same for all recipes; their own are for models of billions of parameters.
Where the task has no counterpart of a method's input, something stands in for it, and every line says what.
"""

import argparse
import contextlib
import functools
import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from arms import TUNING_SEED, prompts_seed
from cells import VALIDATION, choose_device, provenance
from filelock import Timeout
from method_cases import (
    ANSWERS,
    BATCH,
    LEARNING_RATES,
    METHODS,
    PROMPTS_PER_SEED,
    ROLLOUTS_PER_PROMPT,
    SAMPLING,
    SIGNALS,
    STEPS,
    STUDENT,
    TEACHER,
    TEXTS,
    TOP_K,
    Case,
    cases,
)
from summary import Line, alone_at, best_tuning, is_done, keep_line, read_lines

from lightopd.cache.manifests import rollouts_folder, signal_names
from lightopd.cache.shards import shard_path, write_shard
from lightopd.cache.store import open_cache
from lightopd.config import build, merged
from lightopd.lineage.fingerprint import fingerprint_model
from lightopd.models.tokenizer import load_tokenizer
from lightopd.objectives.base.part import Needs
from lightopd.objectives.requirements import needs
from lightopd.pipelines import evaluate, precompute, rewrite, rollout, sft, train
from lightopd.pipelines.caches.join import join
from lightopd.pipelines.methods import find_method
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import (
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.rewriting import RewriteConfig

ROOT = Path(__file__).parents[2]
WORK = ROOT / "runs" / "methods"
RESULTS = ROOT / "docs" / "methods" / "results"
TASK = "tiny"
RATE = "optimizer.lr"
SEEDS = 5
FINETUNING_PROMPTS_SEED = 1
"""Of the prompts whose answers the demo's student was fine-tuned on."""
PROMPTS = {"kind": "running_totals", "render": "plain"}
HELD_OUT = PROMPTS | {"split": "heldout", "count": 2000, "seed": 0}
SAMPLED = {"engine": {"kind": "hf", "generate_rollouts": 500}, "shard_rollouts": 1000}
COMMON = {
    "steps": STEPS,
    "batch_sequences": BATCH,
    "micro_batch_tokens": 2048,
    "checkpoint_every": 100,
    "optimizer": {"schedule": "cosine", "warmup_steps": 5},
}
log = logging.getLogger("methods")


def training_prompts(seed: int) -> Mapping[str, Any]:
    """The prompts that a seed's rollouts answer, none of them drawn as those of the student's fine-tuning."""
    drawn = prompts_seed({"finetuning_prompts_seed": FINETUNING_PROMPTS_SEED}, seed)
    return PROMPTS | {"split": "train", "count": PROMPTS_PER_SEED, "seed": drawn}


def folder_of(seed: int) -> Path:
    """Where the caches of a seed lie."""
    return WORK / f"seed-{seed}"


def plain_cache(seed: int) -> Path:
    """The student's rollouts on the training prompts, each total a turn."""
    cache = folder_of(seed) / "plain"
    settings = {"prompts": training_prompts(seed), "student": str(STUDENT), "cache": cache}
    rollout.run(
        build(
            RolloutConfig,
            settings | {"sampling": SAMPLING | {"n": ROLLOUTS_PER_PROMPT, "seed": seed}} | SAMPLED,
        )
    )
    if not signal_names(cache):
        mark_turns(cache)
    return cache


def pairs_cache(seed: int) -> Path:
    """The teacher's answer to each prompt beside the student's first."""
    pairs = folder_of(seed) / "pairs"
    join(pairs, [answers_cache(seed), plain_cache(seed)], pairs=True)
    return pairs


def answers_cache(seed: int) -> Path:
    """The teacher's answers, as `sft` keeps them."""
    out = folder_of(seed) / ANSWERS.parent
    settings = {
        "prompts": training_prompts(seed),
        "teacher": str(TEACHER),
        "student": str(STUDENT),
        "out": out,
    }
    sampling = {"sampling": SAMPLING | {"n": 1, "seed": seed + 2}}
    sft.run(build(SftConfig, settings | sampling | SAMPLED | {"part": "answers"}))
    return folder_of(seed) / ANSWERS


def mark_turns(path: Path) -> None:
    """Number the totals of each response as turns; a comma ends its total."""
    cache = open_cache(path, signals=())
    comma = load_tokenizer(ModelConfig(path=str(STUDENT))).convert_tokens_to_ids(",")
    folder = rollouts_folder(path)
    for shard in cache.shards:
        table = pq.read_table(shard_path(folder, shard))
        turns = [turns_of(np.array(row), comma) for row in table.column("response_ids").to_pylist()]
        place = table.schema.get_field_index("turns")
        column = pa.array(turns, table.schema.field(place).type)
        marked = table.set_column(place, table.schema.field(place), column)
        write_shard(folder, shard, marked, kind="rollouts", fingerprint=cache.manifest.fingerprint())


def turns_of(ids_R: np.ndarray, comma: int) -> list[int]:
    """Number of the total that each token belongs to."""
    return list(np.cumsum(ids_R == comma) - (ids_R == comma))


def write_text(cache: Path, name: str, seed: int) -> None:
    """Add a text column, four tokens a text and two continuations a branch, where the cache has it not."""
    written = TEXTS[name]
    num_texts = 2 if written.get("gives") == "branches" else 1
    sampling = {"sampling": SAMPLING | {"n": num_texts, "seed": seed + 3, "max_tokens": 4}}
    settings = {"cache": cache, "name": name, "prompts": training_prompts(seed), "engine": SAMPLED["engine"]}
    rewrite.run(build(RewriteConfig, settings | sampling | written))


def score(cache: Path, signals: Iterable[str], seed: int) -> None:
    """Add the signals that the cache has not."""
    for name in signals:
        if name not in signal_names(cache):
            scorer = SIGNALS[name]
            context = scorer.template and {"template": scorer.template, "prompts": training_prompts(seed)}
            settings = {"cache": cache, "teacher": str(scorer.model), "signal": name, "role": scorer.role}
            precompute.run(build(PrecomputeConfig, settings | {"context": context, "top_k": TOP_K}))


def settings_of(case: Case, folder: Path, rate: float, seed: int) -> Mapping[str, Any]:
    """The recipe with the common settings, from the folder of its seed."""
    recipe = find_method(METHODS, case.recipe).settings
    common = merged(COMMON, {"optimizer": {"lr": rate}, "seed": seed})
    return merged(merged(recipe, case.settings(folder)), common)


def config_of(case: Case, cache: Path, rate: float, seed: int) -> TrainConfig:
    """A run on its cache."""
    settings = settings_of(case, cache.parent, rate, seed)
    out = WORK / "trained" / f"{case.run}-{rate:g}-{seed}"
    return build(TrainConfig, settings | {"cache": cache, "student": str(STUDENT), "out": out})


def prepared(case: Case, rate: float, seed: int) -> TrainConfig:
    """The run's settings, with all that its objective asks for in the cache of its seed."""
    with alone_at(folder_of(seed)):
        config = config_of(
            case, plain_cache(seed) if case.cache == "plain" else pairs_cache(seed), rate, seed
        )
        asked = needs(config.objective)
        if asked.answers:
            answers_cache(seed)
        score(config.cache, asked.signals, seed)
        for name in texts_of(asked):
            write_text(config.cache, name, seed)
    return config


def evaluated(model: Path, out: Path, *, is_tuning: bool) -> Line:
    """Accuracy on held-out prompts, or those that a rate is chosen by; KL to the teacher on the answers."""
    prompts = HELD_OUT | (VALIDATION if is_tuning else {})
    settings = {"model": str(model), "teacher": str(TEACHER), "prompts": prompts, "out": out}
    sampling = {"sampling": SAMPLING | {"n": 1, "seed": 1}}
    found = evaluate.run(build(EvalConfig, settings | sampling | SAMPLED)).figures
    return {"accuracy": found["avg_at_k"], "reverse_kl_nats": round(found["reverse_kl_nats"], 5)}


def identity(case: Case, settings: Mapping[str, Any], seed: int) -> str:
    """Hash of what decides a run's figures: settings, prompts, sampling, models, what made signals, texts."""
    wanted = needs(build(ObjectiveConfig, settings["objective"]))
    scorers = [asdict(SIGNALS[name]) | {"model": weights(SIGNALS[name].model)} for name in wanted.signals]
    writers = [TEXTS[name] | {"model": weights(Path(TEXTS[name]["model"]))} for name in texts_of(wanted)]
    rollouts = [training_prompts(seed), SAMPLING, ROLLOUTS_PER_PROMPT, TOP_K, case.cache, HELD_OUT]
    return canonical_hash([settings, rollouts, scorers, writers, weights(STUDENT), weights(TEACHER)])


def texts_of(wanted: Needs) -> tuple[str, ...]:
    """The text columns that an objective reads."""
    return (*wanted.texts, *wanted.chunks, *wanted.shown)


@functools.cache
def weights(model: Path) -> str:
    """The identity of a model."""
    return fingerprint_model(ModelConfig(path=str(model))).identity


def line_of(case: Case, rate: float, seed: int) -> Line:
    """What a run is, before it has figures."""
    settings = settings_of(case, Path("seed"), rate, seed)
    return {
        "key": f"{case.run}/{rate:g}/{seed}",
        "identity": identity(case, settings, seed),
        **{"arm": case.run, "recipe": case.recipe, "regime": TASK, "grid": {}, "tuned": {RATE: rate}},
        **{"seed": seed, "is_tuning": seed == TUNING_SEED},
        **{"stand_in": case.stand_in, "changed": case.changed},
    }


def run_one(case: Case, rate: float, seed: int, *, waits: bool) -> None:
    """Train, evaluate and keep a run that has no line and that no other process is at."""
    line = line_of(case, rate, seed)
    place = WORK / "locks" / line["key"].replace("/", ":").replace(".", "_")
    with contextlib.suppress(Timeout), alone_at(place).acquire(blocking=waits):
        if is_done(RESULTS, line):
            return
        config = prepared(case, rate, seed)
        shutil.rmtree(config.out, ignore_errors=True)
        started_s = time.process_time()
        train.run(config)
        line |= {"train_seconds": round(time.process_time() - started_s, 1)} | provenance()
        line |= evaluated(config.out / "student", config.out / "eval", is_tuning=line["is_tuning"])
        shutil.rmtree(config.out)
        keep_line(RESULTS, line, WORK)
        log.warning("%s: accuracy %.4f", line["key"], line["accuracy"])


def run_case(case: Case, until_s: float, seeds: int) -> None:
    """The runs that choose the learning rate, all of them, and then those that measure."""
    for waits in (False, True):
        for rate in LEARNING_RATES:
            if time.monotonic() < until_s:
                run_one(case, rate, TUNING_SEED, waits=waits)
    chosen = best_tuning(read_lines(RESULTS, case.run), (case.run, TASK, ()))
    for seed in range(min(seeds, SEEDS)):
        if chosen and time.monotonic() < until_s:
            run_one(case, chosen[RATE], seed, waits=False)


def run_untrained() -> None:
    """The student before training."""
    place = {"arm": "untrained", "regime": TASK, "grid": {}, "tuned": {}, "seed": 0, "is_tuning": False}
    line = {"key": "untrained", "identity": "", **place}
    if not is_done(RESULTS, line):
        keep_line(RESULTS, line | evaluated(STUDENT, WORK / "untrained", is_tuning=False), WORK)


def main() -> None:
    """Measure the recipes that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = sorted(path.stem for path in METHODS.glob("*.yaml"))
    parser.add_argument(
        "--only", nargs="+", metavar="RECIPE", choices=named, help="measure these recipes alone"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many of a recipe")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after these")
    options = parser.parse_args()
    choose_device("cpu")  # the runs that are there were made on it
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    until_s = time.monotonic() + 60 * options.minutes
    run_untrained()
    for case in cases():
        if options.only is None or case.recipe in options.only:
            run_case(case, until_s, options.seeds)


if __name__ == "__main__":
    main()
