"""Every recipe on the demo's task: accuracy of the tiny student before and after, one JSON line a run.

    python benchmarks/methods.py                  # all recipes, about 40 minutes on one thread
    python benchmarks/methods.py --only opsd      # the runs of one recipe, and the caches that are missing
    python benchmarks/methods.py --save           # also write docs/methods/results.json

Caches are made by the real stages in `runs/methods` and kept; a recipe's training and evaluation start anew.
Steps, batch, learning rate and schedule are the same for all recipes; the recipes' own are for models of
billions of parameters. Where the task has no counterpart of a method's input, something stands in for it, and
every line says what. The standard error of an accuracy is 0.7 points.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lightopd.cache.manifests import rollouts_folder, signal_names
from lightopd.cache.shards import shard_path, write_shard
from lightopd.cache.store import open_cache
from lightopd.config import build, merged
from lightopd.models.tokenizer import load_tokenizer
from lightopd.objectives.requirements import needs
from lightopd.pipelines import DEMO, RECIPES, evaluate, precompute, rewrite, rollout, sft, train
from lightopd.pipelines.caches.join import join
from lightopd.pipelines.methods import find_method, list_methods
from lightopd.schemas.configs import (
    EvalConfig,
    ModelConfig,
    PrecomputeConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
)
from lightopd.schemas.rewriting import RewriteConfig

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "methods"
RESULTS = ROOT / "docs" / "methods" / "results.json"
METHODS = RECIPES / "methods"

TEACHER, STUDENT = DEMO / "teacher", DEMO / "student"
LEARNING_RATES = (3e-5, 5e-4)
PROMPTS = {"kind": "running_totals", "render": "plain", "seed": 0}
TRAINED = PROMPTS | {"split": "train", "count": 2000}
HELD_OUT = PROMPTS | {"split": "heldout", "count": 2000}
SAMPLING = {"temperature": 1.0, "max_tokens": 20}
SAMPLED = {"engine": {"kind": "hf", "generate_rollouts": 500}, "shard_rollouts": 1000}
TOP_K = 16
COMMON = {
    "steps": 100,
    "batch_sequences": 128,
    "checkpoint_every": 100,
    "optimizer": {"schedule": "cosine", "warmup_steps": 5},
}
SETTINGS = (
    "running totals; 2,000 prompts with 4 rollouts of the student each, top-16 of 32 tokens; 100 steps of "
    "128 rollouts, cosine schedule, 5 warm-up steps, seed 0; 2,000 held-out prompts at temperature 1"
)

WITH_ANSWER = "{{ answer }};{{ prompt }}"
"""`90;12+7+30+41=` for `12+7+30+41=`."""
WITH_WRONG_ADDEND = (
    "{% set addends = prompt[:-1].split('+') %}"
    "{{ addends[:-1] | join('+') }}+{{ addends[-1] | int % 50 + 1 }}="
)
"""`12+7+30+42=` for `12+7+30+41=`."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """What makes a signal."""

    model: Path
    role: Literal["teacher", "self", "reference"]
    template: str | None = None
    """What it sees instead of the prompt."""


SIGNALS = {
    "teacher": Scorer(TEACHER, "teacher"),
    "reference": Scorer(STUDENT, "reference"),
    "rollout_student": Scorer(STUDENT, "reference"),
    "warmup": Scorer(STUDENT, "reference"),
    "dpo": Scorer(TEACHER, "teacher"),
    "reverse_dpo": Scorer(STUDENT, "reference"),
    "privileged": Scorer(TEACHER, "teacher"),
    "second_teacher": Scorer(TEACHER, "teacher", WITH_WRONG_ADDEND),
    "shown": Scorer(STUDENT, "self", WITH_ANSWER),
    "negative": Scorer(TEACHER, "reference", WITH_WRONG_ADDEND),
    **{f"exposure_{level}": Scorer(TEACHER, "teacher", WITH_WRONG_ADDEND) for level in (0, 1)},
    **{f"exposure_{level}": Scorer(TEACHER, "teacher") for level in (2, 3, 4)},
}

REFERENCE = "the reference is the student at rollout"
TURNS = "a turn is one of the three totals"
PRIVILEGED = "the teacher on the plain prompt plays the student that is shown the solution"
SHOWN = (
    "the student is shown the answer before the prompt (`90;12+7+30+41=`), which it has not learnt to read"
)
PAIRS = "4,000 rollouts: an answer of the teacher and one of the student to each prompt"


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe and what it is given on the task."""

    recipe: str
    stand_in: str = ""
    """What stands in for an input that the task has not; empty where nothing has to."""
    changed: str = ""
    """Settings of the recipe that the task calls for, beside the common ones."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The changed settings, for the train config."""
    name: str = ""
    """Name of the run, the recipe's when it has only one."""
    cache: Literal["plain", "pairs"] = "plain"
    """Rollouts of the student, or pairs of an answer of the teacher and one of the student."""

    @property
    def run(self) -> str:
        """Name of the run's folder and figures."""
        return self.name or self.recipe


TEXTS: dict[str, dict[str, Any]] = {
    **{
        name: {"model": str(TEACHER), "template": "{{ prompt }}", "value": r"(\d+)"}
        for name in ("confidence", "second_confidence")
    },
    "feedback_shown": {"model": str(STUDENT), "role": "self", "gives": "context", "template": WITH_ANSWER},
    "continuations": {
        "model": str(TEACHER),
        "gives": "branches",
        "template": "continue",
        "branches": {"places": 2},
    },
}
"""Text columns: what writes them, and from what."""
SELF_TAUGHT = ("opsd", "opsd_code", "opsd_sampled", "mgsd")
SPECIAL = (
    *(Case(name, REFERENCE) for name in ("g_opd", "g_opd_baseline", "exopd", "exopd_baseline")),
    Case(
        "aligndistil",
        "the preference model is the teacher, the reverse-preference model the student at rollout",
    ),
    Case("sod", TURNS),
    Case("tcod", f"{TURNS}; all three are trained from step 4 on"),
    *(Case(name, PRIVILEGED) for name in SELF_TAUGHT),
    Case(
        "atesd",
        "exposures 0 and 1 are the teacher on the prompt with another last addend, "
        "2 to 4 on the plain prompt",
    ),
    *(
        Case(
            name,
            SHOWN,
            settings={"objective": {"signal": "shown"}},
            name=f"{name}_shown",
        )
        for name in SELF_TAUGHT
    ),
    Case(
        "mad_opd",
        "the second teacher is the first on the prompt with another last addend; no debate, and both are "
        "as sure as each other",
    ),
    Case("vpd", f"{PRIVILEGED}, after its training"),
    Case("vpd_teacher", SHOWN),
    Case("vision_opd", f"{PRIVILEGED}, on the teacher's own top-k"),
    Case("pipo", "the support is the teacher's top-k alone"),
    Case("caopd", f"{PRIVILEGED}; no confidence is stated"),
    Case("zppo", "the prompts are the plain ones"),
    Case("omniopd", f"{REFERENCE}; two chunks of four tokens a rollout, two continuations of each"),
    Case("erpd", f"the over-optimised model is the teacher; {REFERENCE}"),
    Case("brts", PAIRS, cache="pairs"),
    Case("v_zero", "the evidence is the prompt; wrong evidence is the prompt with another last addend"),
    *(
        Case(name, PAIRS, cache="pairs")
        for name in ("decoupling_teacher_fkl", "decoupling_teacher_rkl", "soda")
    ),
    Case("trd", f"{PAIRS}; its answers are the rewritten ones, scored on the plain prompt", cache="pairs"),
    Case("raft", f"{PAIRS}; {PRIVILEGED}, and its answers are the refined ones", cache="pairs"),
    Case(
        "video_opd",
        changed="prompts: 1000",
        settings={
            "objective": {
                "select": [
                    {
                        "kind": "teacher_validated",
                        "answers": str(WORK / "sft" / "answers"),
                        "min_teacher": 0.5,
                        "sampler": "top",
                        "prompts": 1000,
                    }
                ]
            }
        },
    ),
    Case(
        "decoupling_lengths",
        changed="lengths: [4, 8, 12], min_entropy: 0",
        settings={
            "objective": {"curriculum": {"kind": "lengths", "lengths": [4, 8, 12], "min_entropy": 0.0}}
        },
    ),
    Case(
        "extrapolation_cliff",
        REFERENCE,
        changed="guard: {action: warn}, since the recipe as it is refuses this cache",
        settings={"objective": {"extrapolate": {"guard": {"action": "warn"}}}},
    ),
)


def cases() -> list[Case]:
    """Every run, by recipe."""
    special: dict[str, list[Case]] = {}
    for case in SPECIAL:
        special.setdefault(case.recipe, []).append(case)
    plain = [method.name for method in list_methods(METHODS)]
    return [case for name in plain for case in special.get(name, [Case(name)])]


def plain_cache() -> Path:
    """The student's rollouts on the training prompts, each total a turn."""
    cache = WORK / "plain"
    settings = {"prompts": TRAINED, "student": str(STUDENT), "cache": cache}
    rollout.run(build(RolloutConfig, settings | {"sampling": SAMPLING | {"n": 4, "seed": 0}} | SAMPLED))
    if not signal_names(cache):
        mark_turns(cache)
    return cache


def pairs_cache() -> Path:
    """The teacher's answer to each prompt beside the student's first."""
    join(WORK / "pairs", [answers_cache(), plain_cache()], pairs=True)
    return WORK / "pairs"


def answers_cache() -> Path:
    """The teacher's answers, as `sft` keeps them."""
    settings = {"prompts": TRAINED, "teacher": str(TEACHER), "student": str(STUDENT), "out": WORK / "sft"}
    sampling = {"sampling": SAMPLING | {"n": 1, "seed": 2}}
    sft.run(build(SftConfig, settings | sampling | SAMPLED | {"part": "answers"}))
    return WORK / "sft" / "answers"


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


def write_text(cache: Path, name: str) -> None:
    """Add a text column, four tokens a text and two continuations a branch, where the cache has it not."""
    written = TEXTS[name]
    num_texts = 2 if written.get("gives") == "branches" else 1
    sampling = {"sampling": SAMPLING | {"n": num_texts, "seed": 3, "max_tokens": 4}}
    settings = {"cache": cache, "name": name, "prompts": TRAINED, "engine": SAMPLED["engine"]}
    rewrite.run(build(RewriteConfig, settings | sampling | written))


def score(cache: Path, signals: Iterable[str]) -> None:
    """Add the signals that the cache has not."""
    for name in signals:
        if name not in signal_names(cache):
            scorer = SIGNALS[name]
            context = scorer.template and {"template": scorer.template, "prompts": TRAINED}
            settings = {"cache": cache, "teacher": str(scorer.model), "signal": name, "role": scorer.role}
            precompute.run(build(PrecomputeConfig, settings | {"context": context, "top_k": TOP_K}))


def config_of(case: Case, cache: Path, learning_rate: float) -> TrainConfig:
    """The recipe with the common settings."""
    recipe = find_method(METHODS, case.recipe).settings
    settings = merged(merged(recipe, case.settings), merged(COMMON, {"optimizer": {"lr": learning_rate}}))
    out = WORK / "trained" / f"{case.run}-{learning_rate:g}"
    return build(TrainConfig, settings | {"cache": cache, "student": str(STUDENT), "out": out})


def measure(case: Case, learning_rate: float, before: Mapping[str, Any]) -> dict[str, Any]:
    """Train and evaluate; the run's line."""
    config = config_of(case, plain_cache() if case.cache == "plain" else pairs_cache(), learning_rate)
    asked = needs(config.objective)
    if asked.answers:
        answers_cache()
    score(config.cache, asked.signals)
    for name in (*asked.texts, *asked.chunks, *asked.shown):
        write_text(config.cache, name)
    shutil.rmtree(config.out, ignore_errors=True)
    started_s = time.monotonic()
    train.run(config)
    seconds = time.monotonic() - started_s
    after = evaluated(config.out / "student", config.out / "eval")
    return {
        "name": f"{case.run} at {learning_rate:g}",
        "ours": after["avg_at_k"],
        "against": before["avg_at_k"],
        "ratio": round(after["avg_at_k"] / before["avg_at_k"], 3),
        "goal": None,
        "unit": "accuracy on 2,000 held-out prompts",
        "peer": "the student before training",
        "recipe": case.recipe,
        "learning_rate": learning_rate,
        "kl_nats": round(after["reverse_kl_nats"], 4),
        "kl_nats_before": round(before["reverse_kl_nats"], 4),
        "train_seconds": round(seconds, 1),
        "stand_in": case.stand_in,
        "changed": case.changed,
    }


def evaluated(model: Path, out: Path) -> dict[str, Any]:
    """Accuracy on held-out prompts, and full-vocabulary KL to the teacher on the answers."""
    settings = {"model": str(model), "teacher": str(TEACHER), "prompts": HELD_OUT, "out": out}
    sampling = SAMPLING | {"n": 1, "seed": 1}
    return evaluate.run(build(EvalConfig, settings | {"sampling": sampling} | SAMPLED)).figures


def save(lines: Iterable[dict[str, Any]]) -> None:
    """Put the lines in place of the ones of the same name, one a line so that differences can be read."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if RESULTS.is_file() else []
    merged_lines = {line["name"]: line for line in (*kept, *lines)}
    rows = ",\n".join("  " + json.dumps(merged_lines[name]) for name in sorted(merged_lines))
    text = f'{{"settings": {json.dumps(SETTINGS)},\n "results": [\n{rows}\n]}}\n'
    RESULTS.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure the recipes that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="measure these recipes alone")
    parser.add_argument("--save", action="store_true", help="write the results beside the pages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only or ():
        find_method(METHODS, name)
    before = evaluated(STUDENT, WORK / "before")
    for case in cases():
        if options.only is None or case.recipe in options.only:
            for learning_rate in LEARNING_RATES:
                line = measure(case, learning_rate, before)
                print(json.dumps(line), flush=True)
                if options.save:
                    save([line])


if __name__ == "__main__":
    main()
