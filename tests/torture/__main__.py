"""Hurt every stage at moments drawn by a seed, resume it, and compare with an undisturbed run.

    python -P tests/torture --rounds 200 --seed 0

A round takes a stage, a fault and a moment; the command runs on tiny models, is hurt, and is given again.
What it made must then have the bytes of an undisturbed run. `--from N` resumes at round N in the same
`--folder`.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARMED = "LIGHTOPD_TORTURE_ARMED"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="Number after the last round.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="first", help="Number of the first round.")
    parser.add_argument("--folder", type=Path, help="Where it works, and adds up.")
    parser.add_argument("--stages", help="Some stages alone, with commas.")
    parser.add_argument("--unhurt", action="store_true", help="Hurt none: what differs then is no finding.")
    parser.add_argument("--minutes", type=float, default=1e9, help="Stop before the next round after them.")
    return parser.parse_args()


def armed_again(folder: Path) -> None:
    """This program again, with the shim below libc, one thread, and its own temporary folders."""
    from hurts import compile_shim

    try:
        library = compile_shim(folder)
    except FileNotFoundError:
        sys.exit("torture: needs a C compiler named cc")
    for name in ("tmp", "user-cache"):
        (folder / name).mkdir(exist_ok=True)
    own = {
        ARMED: str(folder), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder / "tmp"), "XDG_CACHE_HOME": str(folder / "user-cache"),
        "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    os.execve(sys.executable, [sys.executable, "-P", *sys.argv], os.environ | own)


def warm_up() -> None:
    """Import what the stages import, as importing takes longer than they do."""
    import duckdb  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import pandas  # noqa: F401
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    from lightopd.cli.main import main  # noqa: F401
    from lightopd.pipelines import run  # noqa: F401
    from lightopd.training import fit  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    options = arguments()
    if ARMED not in os.environ:
        folder = options.folder or Path(tempfile.mkdtemp(prefix="lightopd-torture-"))
        folder.mkdir(parents=True, exist_ok=True)
        armed_again(folder.resolve())
    os.environ.pop("LD_PRELOAD")
    folder = Path(os.environ[ARMED])
    sys.path.append(str(ROOT / "tests/support/models"))
    warm_up()
    from rounds import Torture
    from stages import STAGES

    torture = Torture(folder)
    torture.prepare()
    stages = options.stages.split(",") if options.stages else list(STAGES)
    has_findings = play(torture, options, stages)
    if options.folder is None:
        shutil.rmtree(folder)
    sys.stdout.flush()
    os._exit(1 if has_findings else 0)  # taking all that was imported down again takes seconds


def play(torture, options: argparse.Namespace, stages: list[str]) -> bool:
    """Play the rounds, tell each, and then the sum of all of the folder; whether any found something."""
    from rounds import drawn_round
    from summary import summary

    log, end = torture.folder / f"rounds-{options.seed}.jsonl", time.monotonic() + 60 * options.minutes
    number = options.first
    while number < options.rounds and time.monotonic() < end:
        stage, hurts = drawn_round(torture, options.seed, number, stages)
        outcome = torture.play(number, stage, [] if options.unhurt else hurts)
        if outcome.findings:
            shutil.rmtree(torture.folder / f"round-{number}", ignore_errors=True)
            shutil.copytree(torture.work, torture.folder / f"round-{number}", symlinks=True)
        with log.open("a") as file:
            file.write(json.dumps(outcome.as_plain()) + "\n")
        hurts = ", then ".join(outcome.hurts)
        print(f"{number:4d} {outcome.stage:11s} {outcome.cpu_s:5.1f} s  {hurts}", flush=True)
        for finding in outcome.findings:
            print(f"     FOUND {finding}", flush=True)
        number += 1
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    print(summary(rows))
    if number < options.rounds:
        print(f"\nstopped before round {number}; resume with --from {number}")
    return any(row["findings"] for row in rows)


if __name__ == "__main__":
    main()
