"""What hidden states lose of the teacher, and what they take: KL over the whole vocabulary, bytes on disk.

    OMP_NUM_THREADS=1 python benchmarks/hidden_signals.py    # SmolLM2-135M-Instruct, its own samples

One line of JSON. `kl` is KL(teacher || what codes and head rebuild), nats a token, float64, on samples at
temperature 0.7 that the statistics of int8 were not made from. `bytes` are those of the signal's Parquet file
with all its columns, `payload` those of codes and scales alone; `bf16_engine` is the KL of the same model run
in bfloat16, its head in float32.
"""

# N = response tokens, D = hidden size, V = vocabulary

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from signals import sample
from torch import Tensor

from lightopd.cache.shards import shard_bytes
from lightopd.cache.signals.channels import Channels, HiddenColumns, channels_from_sums
from lightopd.cache.signals.hidden import hidden_states
from lightopd.cache.tables import scores_to_table
from lightopd.engines.hf.engine import TransformersEngine, load_hf_engine
from lightopd.models.head import Head, last_hidden
from lightopd.models.load import load_model
from lightopd.pipelines.demos.smollm2_weights import convert_gguf, find_smollm2
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.records import Sequence as TokenSequence
from lightopd.schemas.signals.kinds import HiddenStates

CHUNK = 128
CPU = torch.device("cpu")


def count(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(each.response_ids) for each in sequences)


def states(folder: Path, sequences: Sequence[TokenSequence], dtype: str) -> Iterator[Tensor]:
    """Hidden states float32 of each response, by a plain forward pass in a number format."""
    model = load_model(ModelConfig(path=str(folder), dtype=dtype), "cpu")
    for each in sequences:
        ids = torch.tensor(np.concatenate([each.prompt_ids, each.response_ids])[None]).long()
        with torch.no_grad():
            yield last_hidden(model, input_ids=ids, use_cache=False)[0, len(each.prompt_ids) - 1 : -1].float()


@torch.no_grad()
def kl_sum(head: Head, exact_ND: Tensor, other_ND: Tensor) -> float:
    """Sum over positions of KL(exact || other), one head for both."""
    total = 0.0
    for start in range(0, len(exact_ND), CHUNK):
        rows = slice(start, start + CHUNK)
        teacher_NV, rebuilt_NV = (
            head.logits(part[rows]).double().log_softmax(1) for part in (exact_ND, other_ND)
        )
        total += float((teacher_NV.exp() * (teacher_NV - rebuilt_NV)).sum())
    return total


def measure_format(
    engine: TransformersEngine, exact: Sequence[Tensor], measured: Sequence[TokenSequence], kept: tuple
) -> dict[str, float]:
    """KL, and bytes a token on disk, of one format."""
    described, channels = kept
    scores = engine.score_hidden(measured, 0, 0.0, channels)
    head, total = engine.own_head(), 0.0
    for exact_ND, score in zip(exact, scores, strict=True):
        columns = HiddenColumns(score.hidden, score.hidden_scales, channels)
        total += kl_sum(head, exact_ND, hidden_states(columns, CPU))
    table = scores_to_table([str(n) for n in range(len(scores))], scores, "float16", described)
    content = shard_bytes(table, kind="signals/teacher", fingerprint="")
    tokens = count(measured)
    payload = described.size + 2 if channels else 2 * described.size
    return {
        "kl": total / tokens,
        "bytes": round(len(content) / tokens, 1),
        "payload": payload,
        "bytes_over_size": round(len(content) / tokens / described.size, 4),
    }


def measure(teacher: Path, calibrate: int, tokens: int, seed: int) -> dict:
    engine = load_hf_engine(HfEngine(device="cpu"), ModelConfig(path=str(teacher), dtype="float32"))
    calibration, measured = (sample(engine, teacher, n, seed + i) for i, n in enumerate((calibrate, tokens)))
    exact = list(states(teacher, measured, "float32"))
    size = engine.own_head().weight_VD.shape[1]
    channels: Channels = channels_from_sums(*engine.sum_hidden(calibration), count(calibration))
    formats = {
        "int8": (HiddenStates(size=size, format="int8", head="h", channels="c"), channels),
        "bfloat16": (HiddenStates(size=size, format="bfloat16", head="h"), None),
    }
    found: dict = {name: measure_format(engine, exact, measured, kept) for name, kept in formats.items()}
    head = engine.own_head()
    rounded = states(teacher, measured, "bfloat16")
    lost = sum(kl_sum(head, one, other) for one, other in zip(exact, rounded, strict=True))
    found["bf16_engine"] = {"kl": lost / count(measured)}
    found |= {"size": size, "calibration_tokens": count(calibration), "measured_tokens": count(measured)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a model folder; left out, SmolLM2 from its package")
    parser.add_argument("--calibrate", type=int, default=2048, help="response tokens for the statistics")
    parser.add_argument("--tokens", type=int, default=384, help="response tokens that are measured")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = asked.teacher or convert_gguf(find_smollm2(), Path(folder) / "teacher")
        print(json.dumps(measure(teacher, asked.calibrate, asked.tokens, asked.seed)))


if __name__ == "__main__":
    main()
