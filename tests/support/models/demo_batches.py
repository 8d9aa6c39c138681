"""Training batches for the tiny models of the demo's task: right responses, slips, and sampled answers."""

# B = sequences, T = positions

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from demo_responses import corrupted_response, longest_prompt, reference_response
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightopd.rewards.running_totals import NUM_ADDENDS, running_totals

TEACHER_BATCH, STUDENT_BATCH, CORRUPTED_SHARE = 96, 64, 0.3
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Task:
    """Sums of so many numbers, how they are added up, and the lengths that follow."""

    addends: int
    from_last: bool = False
    """The totals begin with the last two numbers."""

    @property
    def max_new_tokens(self) -> int:
        """The longest response, the end token, and room for a slip that makes every total after it longer."""
        return len(reference_response(longest_prompt(self.addends))) + 1 + self.addends - 2

    @property
    def sequence_tokens(self) -> int:
        """The longest prompt and response."""
        return len(longest_prompt(self.addends)) + self.max_new_tokens

    @property
    def context_tokens(self) -> int:
        """Context of the models."""
        return 64 if self.addends == NUM_ADDENDS else self.sequence_tokens


def teacher_batches(
    tokenizer: PreTrainedTokenizerFast, task: Task, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of fresh training prompts, `CORRUPTED_SHARE` of them with a wrong digit."""
    rng = random.Random(seed)
    while True:
        rows = running_totals(rng.getrandbits(64), TEACHER_BATCH, addends=task.addends)
        prompts = [row["prompt"] for row in rows]
        pairs = [
            corrupted_response(prompt, rng, from_last=task.from_last)
            if rng.random() < CORRUPTED_SHARE
            else (reference_response(prompt, from_last=task.from_last), None)
            for prompt in prompts
        ]
        encoded = [
            encode(
                tokenizer, task, prompt, tokenizer.convert_tokens_to_ids([*response, "<eos>"]), wrong_index
            )
            for prompt, (response, wrong_index) in zip(prompts, pairs, strict=True)
        ]
        yield stack(encoded)


def shuffled_batches(
    tokenizer: PreTrainedTokenizerFast, task: Task, prompts: list[str], answers: list[list[int]], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of the given pairs, in a new order in every epoch."""
    ids_BT, labels_BT = stack([encode(tokenizer, task, *pair) for pair in zip(prompts, answers, strict=True)])
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(ids_BT), generator=generator)
        for start in range(0, len(order) - STUDENT_BATCH + 1, STUDENT_BATCH):
            rows = order[start : start + STUDENT_BATCH]
            yield ids_BT[rows], labels_BT[rows]


def encode(
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    prompt: str,
    response_ids: list[int],
    wrong_index: int | None = None,
) -> tuple[list[int], list[int]]:
    """Ids and labels of one example, both `task.sequence_tokens` long and padded on the right.

    Labels are ids on the response and `IGNORED` on the prompt, the padding and the wrong digit.
    """
    ids = tokenizer.convert_tokens_to_ids([*prompt]) + response_ids
    labels = [IGNORED] * len(prompt) + response_ids
    if wrong_index is not None:
        labels[len(prompt) + wrong_index] = IGNORED
    padding = task.sequence_tokens - len(ids)
    return ids + [tokenizer.pad_token_id] * padding, labels + [IGNORED] * padding


def stack(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids and labels as two int64 tensors, (B, T)."""
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])
