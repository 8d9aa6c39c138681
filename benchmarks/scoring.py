"""Tokens per second of scoring with the transformers engine, against what its forward pass alone takes.

    python benchmarks/scoring.py

prints one JSON line per figure: ours, against, ratio (ours / against) and the goal for that ratio, on a
random Llama with the width, heads and vocabulary of SmolLM2-135M and fewer layers, in float32.

Tokens are response tokens, so padding and prompts are waste that costs time and counts nothing. Time is CPU
seconds on one thread: what an idle core would take, however busy the machine is. Contenders take turns, and a
ratio is the median over the rounds of the ratio within a round.
"""

# B = rows of a batch, T = positions, N = response positions, D = hidden size, K = top-k, V = vocabulary

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightopd.engines.hf.batching import plan_batches
from lightopd.engines.hf.hidden_states import num_inputs, pad_right, plain_hidden
from lightopd.engines.hf.score import ScoreSettings, score
from lightopd.models.head import head_of
from lightopd.models.load import LoadedModel
from lightopd.schemas import records

TOP_K = 64
VOCABULARY = 49_152
CONTEXT = 1024
BATCH_TOKENS = 4096
PRODUCT_POSITIONS = 341
"""Positions in one product with the output layer, for the bare pass: 64 MiB of logits, as in the engine."""
NUM_LAYERS = 8
NUM_ROUNDS = 9
GROUP = 8


def make_model() -> LoadedModel:
    """SmolLM2-135M with fewer layers and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    return LoadedModel(model, head_of(model), torch.device("cpu"), CONTEXT)


def make_sequences(num_prompts: int, group: int, prompt_tokens: tuple[int, int]) -> list[records.Sequence]:
    """Groups of responses of very mixed length, log-normal with a median of 30 tokens, in random order."""
    random = np.random.default_rng(0)
    sequences = []
    for _ in range(num_prompts):
        prompt_ids = random.integers(0, VOCABULARY, random.integers(*prompt_tokens)).astype(np.int32)
        for _ in range(group):
            length = int(np.clip(random.lognormal(np.log(30), 1.0), 2, 256))
            sequences.append(
                records.Sequence(prompt_ids, random.integers(0, VOCABULARY, length).astype(np.int32))
            )
    random.shuffle(sequences)
    return sequences


def run_ours(loaded: LoadedModel, sequences: Sequence[records.Sequence], share_prompts: bool = True) -> None:
    score(loaded, sequences, ScoreSettings(TOP_K, 0.0, BATCH_TOKENS, share_prompts))


@torch.inference_mode()
def run_bare(loaded: LoadedModel, sequences: Sequence[records.Sequence]) -> None:
    """Forward pass and output layer over the engine's own batches, and nothing made of the logits."""
    for places in plan_batches([num_inputs(sequence) for sequence in sequences], BATCH_TOKENS):
        hidden_ND = plain_hidden(loaded, [sequences[place] for place in places])
        for part_ND in torch.split(hidden_ND, PRODUCT_POSITIONS):
            loaded.model.lm_head(part_ND)


@torch.inference_mode()
def run_naive(loaded: LoadedModel, sequences: Sequence[records.Sequence]) -> None:
    """Batches in file order, padded, with logits at every position: the loop one writes first.

    It has as many rows in a batch as the longest sequence allows under the engine's token budget.
    """
    longest = max(len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in sequences)
    num_rows = max(1, BATCH_TOKENS // longest)
    for start in range(0, len(sequences), num_rows):
        batch = sequences[start : start + num_rows]
        rows = [np.concatenate([sequence.prompt_ids, sequence.response_ids]) for sequence in batch]
        ids_BT = torch.from_numpy(pad_right(rows))
        mask_BT = torch.from_numpy(pad_right([np.ones_like(row) for row in rows]))
        logits_BTV = loaded.model(input_ids=ids_BT, attention_mask=mask_BT).logits
        logprobs_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
        logprobs_BTV.gather(-1, ids_BT[:, 1:, None])
        top_BTK, _ = logprobs_BTV.topk(TOP_K, dim=-1)
        (1 - top_BTK.exp().sum(-1)).log()


def compare(
    first: Callable[[], None], second: Callable[[], None], num_rounds: int
) -> tuple[float, float, float]:
    """Median CPU seconds of both, and the median over rounds of second / first."""
    seconds: list[list[float]] = []
    for _ in range(num_rounds):
        seconds.append([cpu_seconds(run) for run in (first, second)])
    ours, against = (statistics.median(column) for column in zip(*seconds, strict=True))
    return ours, against, statistics.median(b / a for a, b in seconds)


def cpu_seconds(run: Callable[[], None]) -> float:
    started = time.thread_time()
    run()
    return time.thread_time() - started


def report(
    name: str, sequences: Sequence[records.Sequence], times: tuple[float, float, float], **more: Any
) -> None:
    tokens = sum(len(sequence.response_ids) for sequence in sequences)
    ours, against, ratio = times
    figures = {
        "ours": round(tokens / ours, 1),
        "against": round(tokens / against, 1),
        "ratio": round(ratio, 3),
    }
    print(json.dumps({"name": name, **figures, **more, "unit": "response tokens/s"}), flush=True)


def main() -> None:
    """Print the three figures."""
    torch.set_num_threads(1)
    loaded = make_model()
    mixed = make_sequences(26, 1, (8, 64))
    grouped = make_sequences(3, GROUP, (100, 200))
    run_ours(loaded, mixed[:2])
    report(
        f"hf_scoring_top{TOP_K}_vs_bare_forward",
        mixed,
        compare(lambda: run_ours(loaded, mixed), lambda: run_bare(loaded, mixed), NUM_ROUNDS),
        goal=0.95,
        peer="transformers forward + output layer on the same batches",
    )
    report(
        f"hf_scoring_top{TOP_K}_vs_naive_loop",
        mixed,
        compare(lambda: run_ours(loaded, mixed), lambda: run_naive(loaded, mixed), 3),
        goal=3.0,
        peer="transformers forward, log_softmax and topk on padded batches in file order",
    )
    report(
        f"hf_scoring_groups_of_{GROUP}_vs_prompts_not_shared",
        grouped,
        compare(lambda: run_ours(loaded, grouped), lambda: run_ours(loaded, grouped, False), 3),
        goal=1.2,
        peer="the same engine, prompts run once per response",
    )


if __name__ == "__main__":
    main()
