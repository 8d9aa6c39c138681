"""Every command that writes, on tiny models: what it is given, and what it makes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny_models import save_model, write_prompts

PROMPTS = 8
SHORT = ["--set", "sampling.max_tokens=8", "--set", "shard_rollouts=4"]
SFT = ["--set", "finetune.steps=2", "--set", "finetune.batch_sequences=4"]
TRAIN = ["--steps", "4", "--batch", "4", "--set", "checkpoint_every=1", "--set", "held_out=2"]


@dataclass(frozen=True)
class Stage:
    """A command, and what lies in its folder before it starts."""

    words: Callable[[Path, Path], list[str]]
    """From the folder of inputs and the folder of work."""
    prepare: Callable[[Path, Path], None] = lambda inputs, work: None
    says_when_done: str = ""
    """What it answers with an error once its work is done, where it does not answer that all is there."""


def _rollout(inputs: Path, cache: Path) -> list[str]:
    student, prompts = inputs / "sft/student", inputs / "prompts.jsonl"
    return [
        "rollout",
        "--student",
        f"{student}",
        "--prompts",
        f"{prompts}",
        "--cache",
        f"{cache}",
        "--n",
        "2",
    ]


def _sft(inputs: Path, out: Path) -> list[str]:
    models = ["--teacher", f"{inputs / 'teacher'}", "--student", f"{inputs / 'base'}"]
    return ["sft", *models, "--prompts", f"{inputs / 'prompts.jsonl'}", "--out", f"{out}", *SHORT, *SFT]


def _precompute(inputs: Path, cache: Path) -> list[str]:
    return ["precompute", "--cache", f"{cache}", "--teacher", f"{inputs / 'teacher'}", "--top-k", "4"]


def _train(inputs: Path, out: Path) -> list[str]:
    student = ["--student", f"{inputs / 'sft/student'}", "--cache", f"{inputs / 'cache'}"]
    return ["train", *student, "--out", f"{out}", *TRAIN]


def _push(inputs: Path, bucket: Path) -> list[str]:
    return ["push", f"{inputs / 'cache'}", f"file://{bucket}"]


def _split(inputs: Path, out: Path) -> list[str]:
    return ["cache", "split", f"{inputs / 'cache'}", "--parts", "2", "--out", f"{out}"]


def _rewrite(inputs: Path, work: Path) -> list[str]:
    given = ["--model", f"{inputs / 'teacher'}", "--prompts", f"{inputs / 'prompts.jsonl'}"]
    text = ["--template", "{{ prompt }}{{ response }}", "--name", "refined", "--gives", "rollouts"]
    out = ["--out", f"{work / 'refined'}", "--set", "sampling.max_tokens=6"]
    return ["rewrite", "--cache", f"{work / 'cache'}", *given, *text, *out]


def _eval(inputs: Path, out: Path) -> list[str]:
    models = ["--model", f"{inputs / 'sft/student'}", "--teacher", f"{inputs / 'teacher'}"]
    short = ["--set", "sampling.max_tokens=4", "--set", "shard_rollouts=2"]
    return ["eval", *models, "--prompts", f"{inputs / 'prompts.jsonl'}", "--out", f"{out}", *short]


def _run_file(inputs: Path, path: Path, out: Path, **changes: object) -> None:
    prompts = str(inputs / "prompts.jsonl")
    plain = {
        "out": str(out),
        "teacher": str(inputs / "teacher"),
        "student": str(inputs / "sft/student"),
        "prompts": prompts,
        "eval_prompts": {"path": prompts, "limit": 2},
        "rollout": {"sampling": {"max_tokens": 6, "n": 2}, "shard_rollouts": 8},
        "precompute": {"top_k": 4},
        "train": {"steps": 2, "batch_sequences": 4, "checkpoint_every": 1},
        "eval": {"sampling": {"max_tokens": 4}, "shard_rollouts": 2},
    } | changes
    path.write_text(json.dumps(plain))


def _rows_only(inputs: Path, work: Path) -> None:
    shutil.copytree(inputs / "rollouts", work / "cache")


def _whole_cache(inputs: Path, work: Path) -> None:
    shutil.copytree(inputs / "cache", work / "cache")


def _damaged_cache(inputs: Path, work: Path) -> None:
    """A cache in which a shard of rollouts, and another of the signal, have a flipped byte."""
    _whole_cache(inputs, work)
    for name in ("rollouts/part-00001.parquet", "signals/teacher/part-00002.parquet"):
        content = bytearray((work / "cache" / name).read_bytes())
        content[200] ^= 1
        (work / "cache" / name).write_bytes(content)


STAGES = {
    "sft": Stage(lambda inputs, work: _sft(inputs, work / "sft")),
    "rollout": Stage(lambda inputs, work: [*_rollout(inputs, work / "cache"), *SHORT]),
    "rewrite": Stage(_rewrite, _rows_only),
    "precompute": Stage(lambda inputs, work: _precompute(inputs, work / "cache"), _rows_only),
    "train": Stage(lambda inputs, work: _train(inputs, work / "train")),
    "eval": Stage(lambda inputs, work: _eval(inputs, work / "eval")),
    "run": Stage(lambda inputs, _: ["run", "-c", f"{inputs / 'run.json'}"]),
    "rounds": Stage(lambda inputs, _: ["run", "-c", f"{inputs / 'rounds.json'}"]),
    "join": Stage(
        lambda inputs, work: ["join", f"{work / 'pairs'}", f"{inputs / 'sft/answers'}", f"{inputs / 'cache'}"]
    ),
    "import": Stage(
        lambda inputs, work: [
            "import", f"{inputs / 'responses.jsonl'}", "--format", "responses",
            "--student", f"{inputs / 'sft/student'}", "--cache", f"{work / 'cache'}",
            "--set", "shard_rollouts=3",
        ]
    ),
    "export": Stage(
        lambda inputs, work: ["export", f"{inputs / 'cache'}", f"{work / 'dataset'}"],
        says_when_done="is there already, and is not replaced",
    ),
    "repair": Stage(lambda inputs, work: ["verify", f"{work / 'cache'}", "--repair"], _damaged_cache),
    "index": Stage(lambda inputs, work: ["index", f"{work / 'cache'}"], _whole_cache),
    "copy": Stage(
        lambda inputs, work: [
            *_precompute(inputs, work / "cache"), "--rollouts", f"{inputs / 'cache'}", "--signal", "second",
        ]
    ),
    "push": Stage(lambda inputs, work: _push(inputs, work / "bucket")),
    "pull": Stage(lambda inputs, work: ["pull", f"file://{inputs / 'bucket'}", f"{work / 'cache'}"]),
    "merge": Stage(
        lambda inputs, work: [
            "cache", "merge", f"{inputs / 'parts/part-1'}", f"{inputs / 'parts/part-2'}",
            "--out", f"{work / 'cache'}",
        ],
        says_when_done="is there already, and is not replaced",
    ),
    "split": Stage(
        lambda inputs, work: _split(inputs, work / "parts"),
        says_when_done="is there already, and is not replaced",
    ),
    "drop-signal": Stage(
        lambda inputs, work: ["cache", "drop-signal", f"{work / 'cache'}", "teacher", "--yes"],
        _whole_cache,
        says_when_done="has no signal 'teacher'",
    ),
}  # fmt: skip


def make_inputs(inputs: Path, work: Path, call: Callable[[list[str]], None]) -> None:
    """Models, prompts, responses, a cache before and after scoring, and the files of the runs."""
    inputs.mkdir(parents=True)
    save_model(inputs / "teacher", 0)
    save_model(inputs / "base", 1, layers=1)
    write_prompts(inputs / "prompts.jsonl", PROMPTS)
    rows = [{"prompt": f"{i}+1=", "response": f"{i + 1}", "id": f"r{i}"} for i in range(9)]
    (inputs / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(_sft(inputs, inputs / "sft"))
    call([*_rollout(inputs, inputs / "rollouts"), *SHORT])
    shutil.copytree(inputs / "rollouts", inputs / "cache")
    call(_precompute(inputs, inputs / "cache"))
    call(_push(inputs, inputs / "bucket"))
    call(_split(inputs, inputs / "parts"))
    _run_file(inputs, inputs / "run.json", work / "run")
    rounds = {"steps": 4, "prompts_per_round": 4}
    _run_file(inputs, inputs / "rounds.json", work / "run", rounds=rounds)
