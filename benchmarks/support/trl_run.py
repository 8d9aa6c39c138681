"""One training of trl's DistillationTrainer, live; runs in the environment of `peers.py`.

python benchmarks/support/trl_run.py SETTINGS.json        prints its seconds of a core as JSON
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from trl_step import plain_settings


def main(settings: dict[str, Any]) -> dict[str, float]:
    """Train as the file says, save the student in its `out`.

    Keys: student, teacher and out (folders), prompts (texts), steps, batch, max_tokens, seed,
    and of the optimizer lr, warmup_steps, schedule, betas, weight_decay, clip_norm.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationTrainer

    torch.set_num_threads(1)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32)
        for name in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(settings["student"], padding_side="left")
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=_arguments(settings),
        train_dataset=Dataset.from_dict({"prompt": settings["prompts"]}),
        processing_class=tokenizer,
    )
    begun_s = time.process_time()
    trainer.train()
    seconds = time.process_time() - begun_s
    student.save_pretrained(settings["out"])
    tokenizer.save_pretrained(settings["out"])
    return {"train_seconds": round(seconds, 2)}


def _arguments(settings: dict[str, Any]) -> Any:
    """The optimizer is the arms'; samples are of now."""
    beta1, beta2 = settings["betas"]
    return plain_settings(
        *(settings["out"] + "-trl", settings["batch"], settings["steps"], settings["max_tokens"]),
        learning_rate=settings["lr"],
        warmup_steps=settings["warmup_steps"],
        lr_scheduler_type=settings["schedule"],
        adam_beta1=beta1,
        adam_beta2=beta2,
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["clip_norm"],
        seed=settings["seed"],
    )


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
