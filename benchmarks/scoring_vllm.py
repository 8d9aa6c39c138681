"""Tokens per second of scoring with the vllm engine, shard written, against vLLM's own passes.

    python benchmarks/scoring_vllm.py

prints one JSON line per figure: ours, against, ratio (ours / against) and the goal for that ratio, on two
random Llamas in float32, top-64: one with the width, heads and vocabulary of SmolLM2-135M and fewer layers,
and a narrow one that costs almost nothing to run, so that what is done with the log-probabilities shows.

Ours is `engine.score`, shard by shard, with packing, compressing and writing of each shard beside the scoring
of the next, as `precompute` does it. Against it stand vLLM's prompt log-probabilities of the same sequences
in its flat form, and as dictionaries, both thrown away. All three use one loaded vLLM and take turns; a ratio
is the median over the rounds of the ratio within a round. Tokens are response tokens, seconds are wall-clock:
vLLM works in processes of its own.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightopd.cache.shards import write_shard
from lightopd.cache.tables import scores_to_table
from lightopd.engines.vllm.concurrency import run_all
from lightopd.engines.vllm.in_process import ENTRY_BYTES, VllmInProcess, load_vllm_engine
from lightopd.engines.vllm.requests import IN_FLIGHT_BYTES
from lightopd.engines.vllm.settings import scoring_params, vllm_version
from lightopd.pipelines.shared.overlap import make_and_write
from lightopd.schemas import records
from lightopd.schemas.configs import ModelConfig, VllmEngine

TOP_K = 64
CONTEXT = 1024
NUM_ROUNDS = 4
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
NARROW = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS = {"smollm2 width": (SMOLLM2, 2, 48), "narrow": (NARROW, 4, 256)}
"""Sizes, number of shards, and sequences in one; 256 is what `rollout` makes, too many for the slow model."""


def save_model(folder: Path, sizes: dict[str, int]) -> ModelConfig:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=CONTEXT, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def make_sequences(vocabulary: int, count: int) -> list[records.Sequence]:
    """Short prompts, and responses of very mixed length (log-normal, median 60 tokens, at most 400)."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(60), 0.8, count), 1, 400).astype(int)

    def ids(length: int) -> records.Ids:
        return random.integers(0, vocabulary, length).astype(np.int32)

    return [records.Sequence(ids(int(random.integers(10, 40))), ids(int(length))) for length in lengths]


def score_and_write(
    engine: VllmInProcess, sequences: Sequence[records.Sequence], folder: Path, shard_size: int
) -> None:
    """What `precompute` does with some shards."""

    def write(shard: int, scores: list[records.RolloutSignal]) -> None:
        table = scores_to_table([str(index) for index in range(len(scores))], scores, "float16")
        write_shard(folder, shard, table, kind="signals/teacher", fingerprint="benchmark")

    make_and_write(
        range(len(sequences) // shard_size),
        lambda shard: engine.score(sequences[shard * shard_size :][:shard_size], TOP_K),
        write,
        lambda shard: None,
    )


def bare_pass(engine: VllmInProcess, sequences: Sequence[records.Sequence], is_flat: bool) -> None:
    """vLLM's prompt log-probabilities, thrown away as they come."""
    params = scoring_params(TOP_K)
    params.flat_logprobs = is_flat

    async def ask(index: int) -> None:
        pair = sequences[index]
        await engine._answer(np.concatenate([pair.prompt_ids, pair.response_ids]), params)

    lengths = [len(pair.prompt_ids) + len(pair.response_ids) for pair in sequences]
    sizes = [ENTRY_BYTES * (TOP_K + 1) * length for length in lengths]
    engine._loop.run(run_all(ask, sizes, IN_FLIGHT_BYTES))


def seconds_of(run: Callable[[], Any]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def measure(engine: VllmInProcess, folder: Path, num_shards: int, shard_size: int) -> dict[str, list[float]]:
    """Response tokens per second of each contender, round by round."""
    sequences = make_sequences(engine.vocabulary_size, num_shards * shard_size)
    tokens = sum(len(pair.response_ids) for pair in sequences)
    contenders: dict[str, Callable[[], Any]] = {
        "ours": lambda: score_and_write(engine, sequences, folder, shard_size),
        "flat": lambda: bare_pass(engine, sequences, True),
        "dict": lambda: bare_pass(engine, sequences, False),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(NUM_ROUNDS + 1):
        for name, run in contenders.items():
            rate = tokens / seconds_of(run)
            if round_index:  # the first round warms up
                rates[name].append(rate)
    return rates


def report(model: str, rates: dict[str, list[float]], version: str) -> None:
    """Print the figures of one model."""
    for against, goal in (("flat", 0.95), ("dict", None)):
        pairs = zip(rates["ours"], rates[against], strict=True)
        figure = {
            "name": f"vllm, {model}: shard written / its own {against} prompt log-probabilities",
            "ours": round(statistics.median(rates["ours"]), 1),
            "against": round(statistics.median(rates[against]), 1),
            "ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
            "goal": goal,
            "version": version,
            "unit": "response tokens/s",
        }
        print(json.dumps(figure), flush=True)


def main() -> None:
    """Measure on both models."""
    for name, (sizes, num_shards, shard_size) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = save_model(Path(folder) / "model", sizes)
            (Path(folder) / "shards").mkdir()
            engine = load_vllm_engine(VllmEngine(kv_cache_gib=1.0), model)
            try:
                rates = measure(engine, Path(folder) / "shards", num_shards, shard_size)
            finally:
                engine.close()
            report(name, rates, vllm_version())


if __name__ == "__main__":
    main()
