"""The step of trl's DistillationTrainer on given responses; runs in the environment of `peers.py`."""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any


def time_steps(
    student: Any, teacher: Any, prompts: list[list[int]], responses: list[list[int]], num_steps: int
) -> list[float]:
    """CPU seconds of whole steps over all responses, the first left out.

    Sampling is replaced by handing out `responses`; tokenisation by `prompts`.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not marks:
                marks.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.process_time())

    class Cached(DistillationTrainer):  # type: ignore[misc]
        def _tokenize_prompts(self, texts: list[str]) -> Any:
            self.rows = [int(text) for text in texts]
            return [prompts[row] for row in self.rows], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            return [responses[row] for row in self.rows]

    rows = Dataset.from_dict({"prompt": [str(row) for row in range(len(prompts))]})
    with tempfile.TemporaryDirectory() as folder:
        Cached(
            model=student,
            teacher_model=teacher,
            args=plain_settings(
                folder, len(prompts), num_steps + 1, max(map(len, responses)), learning_rate=1e-6
            ),
            train_dataset=rows,
            processing_class=_tokenizer(),
            callbacks=[Clock()],
        ).train()
    seconds = [end - begin for begin, end in itertools.pairwise(marks)]
    return seconds[1:]


def plain_settings(folder: str, batch: int, steps: int, longest: int, **more: Any) -> Any:
    """Of a trainer on the CPU in float32 that writes nothing: its loss is trl's default, reverse KL."""
    from trl import DistillationConfig

    return DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        max_steps=steps,
        max_completion_length=longest,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **more,
    )


def _tokenizer() -> Any:
    """Of two tokens: the trainer asks for one, and ids are handed to it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")),
        eos_token="<eos>",
        pad_token="<eos>",
    )
