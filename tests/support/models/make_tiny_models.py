"""Train the tiny teacher and SFT student that ship with lightopd for its demo.

What it makes, each a Hugging Face folder in float32 with a character-level tokenizer:

1. `teacher`: 0.86M parameters, trained on right running totals and on responses with one wrong
   digit that go on correctly from there (see `demo_responses`).
2. `base`: the student before any training, random weights from the seed.
3. `student`: 0.36M parameters, `base` after SFT on 3,000 answers *sampled from the teacher*, so
   the model that wrote the SFT data is the model that later scores the student's rollouts. That
   is the condition (teacher consistency) under which distillation is meant to work, and the
   student's folder records it. Few answers leave the student something to learn from its own.

Beside the weights of each lies `provenance.json`: how it was made, from which teacher file, and
its accuracy on held-out prompts. The models are trained here by a plain loop and not by the
package's own SFT stage, so that a change of that stage does not change the shipped files.

    python -m make_tiny_models --out pipelines/demo

takes about a quarter of an hour on two CPU cores. `--reuse-teacher` keeps the teacher that lies
in the output folder and makes the two students again; `--without-student` makes teacher and base only.
"""

# B = sequences, T = positions, V = vocabulary

import argparse
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from demo_batches import (
    CORRUPTED_SHARE,
    IGNORED,
    STUDENT_BATCH,
    TEACHER_BATCH,
    Task,
    encode,
    shuffled_batches,
    stack,
    teacher_batches,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lightopd.lineage.fingerprint import fingerprint_model, write_student_lineage
from lightopd.rewards.running_totals import NUM_ADDENDS, running_totals, total_reward
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.manifest import SftLineage, StudentLineage

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789+=,-*/()<>?!.:; \n[]"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

TEACHER_STEPS, TEACHER_PEAK_LR = 2500, 3e-3
STUDENT_STEPS, STUDENT_PEAK_LR, NUM_SFT_ANSWERS = 1800, 2e-3, 3000
NUM_HELD_OUT = 2000
# One seed per use, added to the seed of the run: no two draws of prompts share a stream.
SFT_SEED, HELD_OUT_SEED = 1, 2


def main() -> None:
    """Parse the command line and make the three folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher, base and student")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; results depend on them")
    parser.add_argument("--addends", type=int, default=NUM_ADDENDS, help="numbers in a sum")
    parser.add_argument("--from-last", action="store_true", help="totals begin with the last two numbers")
    parser.add_argument("--reuse-teacher", action="store_true", help="keep the teacher in --out")
    parser.add_argument("--without-student", action="store_true", help="make teacher and base only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    # Sure predictions have probabilities below 1e-38, slow on some CPUs; no gain was measured here.
    torch.set_flush_denormal(True)
    task = Task(arguments.addends, arguments.from_last)
    tokenizer = character_tokenizer(task)
    if not arguments.reuse_teacher:
        make_teacher(arguments.out / "teacher", tokenizer, task, arguments.seed)
    base = make_base(arguments.out / "base", tokenizer, task, arguments.seed)
    if not arguments.without_student:
        make_student(arguments.out, base, tokenizer, task, arguments.seed)


def make_teacher(folder: Path, tokenizer: PreTrainedTokenizerFast, task: Task, seed: int) -> None:
    """Train the teacher on right and corrupted responses, measure it, save it with provenance."""
    model = random_model(tokenizer, task, hidden_size=128, num_layers=4, seed=seed)
    batches = teacher_batches(tokenizer, task, seed)
    train(model, batches, TEACHER_STEPS, TEACHER_PEAK_LR)
    save(
        folder,
        model,
        tokenizer,
        task,
        {
            "seed": seed,
            "steps": TEACHER_STEPS,
            "batch_size": TEACHER_BATCH,
            "peak_learning_rate": TEACHER_PEAK_LR,
            "data": (
                f"running totals of {task.addends} numbers from 1 to 50, "
                f"{'from the last on, ' if task.from_last else ''}training prompts only, drawn afresh at "
                f"every step; {CORRUPTED_SHARE:.0%} of the responses carry one wrong digit, without a loss "
                "on it, and go on correctly from there"
            ),
            "held_out_accuracy": accuracy(model, tokenizer, task, seed + HELD_OUT_SEED),
        },
    )


def make_base(folder: Path, tokenizer: PreTrainedTokenizerFast, task: Task, seed: int) -> Qwen3ForCausalLM:
    """Save the student before any training."""
    model = random_model(tokenizer, task, hidden_size=96, num_layers=3, seed=seed)
    save(folder, model, tokenizer, task, {"seed": seed, "steps": 0, "data": "none: random weights"})
    return model


def make_student(
    out: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, seed: int
) -> None:
    """Train the base on answers sampled from the teacher in `out`, save the student."""
    teacher = Qwen3ForCausalLM.from_pretrained(out / "teacher").eval()
    prompts = [
        row["prompt"] for row in running_totals(seed + SFT_SEED, NUM_SFT_ANSWERS, addends=task.addends)
    ]
    answers = sample(teacher, tokenizer, task, prompts, seed + SFT_SEED)
    train(model, shuffled_batches(tokenizer, task, prompts, answers, seed), STUDENT_STEPS, STUDENT_PEAK_LR)
    save(
        out / "student",
        model,
        tokenizer,
        task,
        {
            "seed": seed,
            "steps": STUDENT_STEPS,
            "batch_size": STUDENT_BATCH,
            "peak_learning_rate": STUDENT_PEAK_LR,
            "data": f"{NUM_SFT_ANSWERS:,} answers of the teacher, sampled at temperature 1",
            "base_sha256": sha256_of(out / "base" / "model.safetensors"),
            "teacher_sha256": sha256_of(out / "teacher" / "model.safetensors"),
            "held_out_accuracy": accuracy(model, tokenizer, task, seed + HELD_OUT_SEED),
            "held_out_kl_to_teacher_nats_per_token": kl_to_teacher(
                model, teacher, tokenizer, task, seed + HELD_OUT_SEED
            ),
        },
    )
    record_lineage(out)


def record_lineage(out: Path) -> None:
    """Write into the student's folder which teacher wrote its data."""
    base, student, teacher = (
        fingerprint_model(ModelConfig(path=str(out / name))).model_copy(update={"source": name})
        for name in ("base", "student", "teacher")
    )
    sft = SftLineage(proof="recorded", teacher=teacher)
    write_student_lineage(
        out / "student", StudentLineage(student=student, base=base, sft=sft, made_by="make_tiny_models")
    )


def character_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per character, 32 in all, and a template of bare content."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=task.context_tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_model(
    tokenizer: PreTrainedTokenizerFast, task: Task, hidden_size: int, num_layers: int, seed: int
) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights from the seed, float32, embeddings tied."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=hidden_size // 4,
        max_position_embeddings=task.context_tokens,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def train(
    model: Qwen3ForCausalLM, batches: Iterator[tuple[Tensor, Tensor]], steps: int, peak_lr: float
) -> None:
    """Minimise the mean cross-entropy of the labels with AdamW, warm-up and a cosine to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 200) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in range(steps):
        ids_BT, labels_BT = next(batches)
        logits_BTV = model(ids_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
        )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 250 == 0:
            log.info("step %d/%d, loss %.4f nats per token", step + 1, steps, loss.item())
    model.eval()


@torch.no_grad()
def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, prompts: list[str], seed: int
) -> list[list[int]]:
    """The ids of one response per prompt, at temperature 1 from the whole vocabulary.

    Each ends with the end token, unless it was cut at `task.max_new_tokens`.
    """
    torch.manual_seed(seed)
    responses: list[list[int]] = []
    for start in range(0, len(prompts), 1000):
        batch = tokenizer(prompts[start : start + 1000], padding=True, return_tensors="pt")
        ids_BT = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=generation_config(tokenizer, task),
        )
        for ids in ids_BT[:, batch["input_ids"].shape[1] :].tolist():
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
            responses.append(ids[:end])
    return responses


def generation_config(tokenizer: PreTrainedTokenizerFast, task: Task) -> GenerationConfig:
    """Plain sampling: the defaults of the library would cut the vocabulary to 50 tokens."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=task.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, seed: int) -> float:
    """Share of `NUM_HELD_OUT` held-out prompts answered rightly by one sample each."""
    rows = running_totals(seed, NUM_HELD_OUT, "heldout", task.addends)
    sampled = sample(model, tokenizer, task, [row["prompt"] for row in rows], seed)
    responses = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    scores = [
        total_reward(response, row["answer"], task.addends)
        for response, row in zip(responses, rows, strict=True)
    ]
    share = sum(scores) / len(scores)
    log.info("sampled accuracy on %d held-out prompts: %.4f", NUM_HELD_OUT, share)
    return share


@torch.no_grad()
def kl_to_teacher(
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    seed: int,
) -> float:
    """Mean KL(student || teacher) in nats at the response positions of the student's own samples.

    Over the whole vocabulary, on the held-out prompts, the end token included.
    """
    prompts = [row["prompt"] for row in running_totals(seed, NUM_HELD_OUT, "heldout", task.addends)]
    responses = sample(student, tokenizer, task, prompts, seed)
    ids_BT, labels_BT = stack(
        [encode(tokenizer, task, *pair) for pair in zip(prompts, responses, strict=True)]
    )
    student_BTV = student(ids_BT[:, :-1]).logits.log_softmax(-1)
    teacher_BTV = teacher(ids_BT[:, :-1]).logits.log_softmax(-1)
    kl_BT = (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1)
    return float(kl_BT[labels_BT[:, 1:] != IGNORED].mean().item())


def save(
    folder: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    facts: dict[str, Any],
) -> None:
    """Write weights, tokenizer and `provenance.json`: `facts`, the weights' hash and the versions."""
    model.generation_config = generation_config(tokenizer, task)
    model.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()  # set by the last padded batch, and saved with the tokenizer
    tokenizer.save_pretrained(folder)
    provenance = {
        "script": "make_tiny_models",
        "sha256": sha256_of(folder / "model.safetensors"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        **facts,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    log.info("saved %s: %s", folder, provenance)


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
