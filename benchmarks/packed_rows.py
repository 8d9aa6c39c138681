"""Packed rows against padded ones on three mixes of lengths: padding, and CPU seconds of a step.

    OMP_NUM_THREADS=1 python benchmarks/packed_rows.py

prints one JSON line per figure: packed, padded (`ours` and `against`) and their ratio. Padding is the share
of positions that hold nothing: in a step of 256 rollouts and micro-batches of 16,384 tokens, which is counted
and not run, and in the step that is timed, of 16 rollouts and micro-batches of 2,048 tokens. Seconds are
those of the forward and backward passes of that step with the sampled-token loss, on one thread and the
student of `benchmarks/train_step.py`; the layouts take turns on it, and the ratio is the median over pairs.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from support.workers import in_process, main, report, write_cache
from train_step import PROMPT_TOKENS, SIZES, STUDENT_LAYERS, make_model

LAYOUTS = ("packed", "padded")
MIXES = ("equal", "uniform", "long_tailed")
TIMED, COUNTED = (16, 2048), (256, 16_384)
"""Rollouts of a step, tokens of a micro-batch."""
PAIRS = 2


def lengths_of(mix: str, count: int) -> list[int]:
    """Tokens of prompt and response: 256 each, 64 to 448, or 32 and an exponential of mean 200."""
    shares = (np.arange(count) + 0.5) / count
    if mix == "equal":
        return [256] * count
    if mix == "uniform":
        return [int(length) for length in 64 + 384 * shares]
    return [int(length) for length in 32 - 200 * np.log(1 - shares)]


def padding(mix: str, layout: str, rollouts: int, budget: int) -> float:
    """Share of the positions of a step that no token fills."""
    from lightopd.training.data.plan import pack
    from lightopd.training.data.row_layout import lay_out

    lengths_B = np.array(lengths_of(mix, rollouts), dtype=np.int32)
    row_tokens = int(lengths_B.max()) if layout == "packed" else None
    (micro_batches,) = pack(lengths_B, budget, 1, row_tokens=row_tokens)
    positions = sum(lay_out(lengths_B[places], row_tokens).num_padded for places in micro_batches)
    return 1 - int(lengths_B.sum()) / positions


class Passes:
    """Forward and backward over the micro-batches of one step, as `StudentModule` makes them."""

    def __init__(self, student: Any, path: Path, layout: str) -> None:
        from support.synthetic_cache import open_data

        from lightopd.schemas.finetune import FinetuneConfig
        from lightopd.schemas.objectives.objective import ObjectiveConfig
        from lightopd.training.data.batches import StepDataset
        from lightopd.training.data.plan import make_plan

        self.student, self.objective = student, ObjectiveConfig.model_validate({"target": "log_ratio"})
        rollouts, budget = TIMED
        finetune = FinetuneConfig(batch_sequences=rollouts, micro_batch_tokens=budget, layout=layout)
        store, index = open_data(path, self.objective)
        rows = StepDataset(make_plan(index, finetune, 0, 1), store)[0]
        assert isinstance(rows, list)
        self.micro_batches = rows

    def seconds(self, last: int | None = None) -> float:
        """CPU seconds of all micro-batches, or of the `last` smallest."""
        import torch

        from lightopd.objectives.loss import compute_loss
        from lightopd.training.data.batches import collate
        from lightopd.training.student.forward import student_tokens

        began = time.process_time()
        for rows in self.micro_batches[-last if last else 0 :]:
            batch = collate(rows, torch.device("cpu"))
            student = student_tokens(self.student, batch, ())
            compute_loss(self.objective, batch.rollouts, student).value.backward()
        seconds = time.process_time() - began
        self.student.zero_grad(set_to_none=False)
        return seconds


def work_time(mix: str, path: Path) -> list[list[float]]:
    """Seconds of both layouts in turn, after a micro-batch of each to warm up."""
    from lightopd.training.student.training_mode import prepare_student

    student = prepare_student(make_model(STUDENT_LAYERS), gradient_checkpointing=False)
    both = [Passes(student, path, layout) for layout in LAYOUTS]
    for one in both:
        one.seconds(last=1)
    return [[one.seconds() for one in both] for _ in range(PAIRS)]


def report_all(folder: Path) -> None:
    for mix in MIXES:
        for name, sizes in (("padding", COUNTED), ("padding_timed", TIMED)):
            packed, padded = (padding(mix, layout, *sizes) for layout in LAYOUTS)
            report(f"{name}_{mix}", packed, padded, packed / padded if padded else 1, "-", "share", "padded")
        write_cache(
            folder / mix,
            num_shards=1,
            per_shard=TIMED[0],
            lengths=[length - PROMPT_TOKENS for length in lengths_of(mix, TIMED[0])],
            top_k=1,
            vocabulary_size=SIZES["vocab_size"],
            prompt_tokens=PROMPT_TOKENS,
        )
        pairs = in_process(__file__, "time", mix, folder / mix)
        packed, padded = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        report(f"step_time_{mix}", packed, padded, ratio, "-", "CPU seconds", "padded")


if __name__ == "__main__":
    main(__doc__, {"time": work_time}, report_all)
