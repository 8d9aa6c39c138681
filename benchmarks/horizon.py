"""What a horizon saves: bytes and scoring time of a signal of 10, 30 and 100 % of each response.

    OMP_NUM_THREADS=1 python benchmarks/horizon.py          # a random Llama of 4 layers over 49,152 tokens
    python benchmarks/horizon.py --teacher FOLDER --lengths 64 512

One line of JSON. Responses are random ids of lengths spread evenly between the two given ones, after prompts
of 64 tokens; `cpu_seconds` is the processor time of the engine alone, the least of a few; `bytes` are those
of the shard on disk.
"""

# R = rollouts, K = kept tokens

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightopd.cache.shards import shard_bytes
from lightopd.cache.signals.horizon import scored_length
from lightopd.cache.tables import scores_to_table
from lightopd.engines.base import Engine
from lightopd.engines.hf.engine import load_hf_engine
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.records import Sequence

HORIZONS = (0.1, 0.3, None)
PROMPT_TOKENS = 64
REPEATS = 3


def save_teacher(folder: Path) -> Path:
    """A random model whose scoring costs what a small one's does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_sequences(rollouts: int, lengths: tuple[int, int], vocabulary: int) -> list[Sequence]:
    """Random ids, with lengths evenly spread."""
    random = np.random.default_rng(0)
    sizes = np.linspace(*lengths, rollouts).round().astype(int)
    return [
        Sequence(*(random.integers(0, vocabulary, size).astype(np.int32) for size in (PROMPT_TOKENS, each)))
        for each in sizes
    ]


def measure(engine: Engine, sequences: list[Sequence], top_k: int) -> dict[str, dict[str, float]]:
    """By horizon: tokens, processor seconds, bytes, and the two over those of whole responses."""
    found: dict[str, dict[str, float]] = {}
    for horizon in HORIZONS:
        cut = [
            Sequence(one.prompt_ids, one.response_ids[: scored_length(horizon, len(one.response_ids))])
            for one in sequences
        ]
        seconds = []
        for _ in range(REPEATS):
            began_s = time.process_time()
            scores = engine.score(cut, top_k)
            seconds.append(time.process_time() - began_s)
        names = [f"{number:032x}" for number in range(len(cut))]
        content = shard_bytes(scores_to_table(names, scores, "float16"), kind="trial", fingerprint="")
        tokens = sum(len(one.response_ids) for one in cut)
        found[f"{horizon or 1:g}"] = {"tokens": tokens, "cpu_seconds": min(seconds), "bytes": len(content)}
    whole = dict(found["1"])
    for figures in found.values():
        for name in ("cpu_seconds", "bytes"):
            figures[f"{name}_share"] = round(figures[name] / whole[name], 3)
        figures["cpu_seconds"] = round(figures["cpu_seconds"], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a model folder; left out, a random one")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument(
        "--lengths", type=int, nargs=2, default=(64, 512), help="shortest and longest response"
    )
    parser.add_argument("--top-k", type=int, default=32)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = asked.teacher or save_teacher(Path(folder) / "teacher")
        engine = load_hf_engine(HfEngine(device="cpu"), ModelConfig(path=str(teacher)))
        vocabulary = json.loads((Path(teacher) / "config.json").read_text())["vocab_size"]
        sequences = make_sequences(asked.rollouts, tuple(asked.lengths), vocabulary)
        found = measure(engine, sequences, asked.top_k)
        engine.close()
    print(json.dumps({"horizon": found, "top_k": asked.top_k, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
