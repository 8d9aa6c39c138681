"""Bytes a token of a teacher's kept entries, and what is lost of it, by support and by encoding.

    python benchmarks/signal_bytes.py --scores /tmp/scores     # SmolLM2's own samples, drawn once and kept
    python benchmarks/signal_bytes.py --scores /tmp/scores --json docs/decisions/0012-bytes.json

One line of JSON, for SmolLM2-135M-Instruct's own samples at T = 0.7 and for synthetic teachers, peaked and
flat, at V = 151,936. Bytes are those of a signal's whole shards: sampled token, counts, tail, entries, ids
of rollouts. `kl` is KL(teacher || what is rebuilt) over the whole vocabulary on tokens that the shape was
not made from. Speeds are CPU time of one thread. The entropy coder needs `pip install constriction`.
docs/decisions/0012-bytes-of-a-signal.md draws the decision from it.
"""

# N = response tokens, V = vocabulary, C = kept entries of all positions end to end; nats

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from support.kept_entries import (
    BLOCK,
    WIDEST,
    Kept,
    Measure,
    Support,
    Teachers,
    keep,
    load_teachers,
    shapes,
    synthetic_teachers,
    widest,
)
from support.layout_candidates import synthetic_capture
from support.signal_encodings import Encoding, encodings, frequency_codes

THRESHOLDS = (3e-3, 2e-3, 1.5e-3, 1e-3, 8e-4, 6e-4, 5e-4, 4e-4, 3e-4, 2e-4, 1e-4)
SUPPORTS = (*(Support(k) for k in (32, 64, 128)), *(Support(min_probability=p) for p in THRESHOLDS))
EVERY_ENCODING = ("top-64", "p > 1e-03", "p > 3e-04")
"""Supports that are written in every way; the others in those of the curve."""
CURVE = (
    "float16",
    "sixteenths",
    "eighths",
    "quarters",
    "eighths, by id, gaps",
    "quarters, by frequency, gaps",
)
GOALS = (0.12, 0.098, 0.08)
"""KL at which bytes are told, with the tail by its shape."""
REPEATS, READINGS = 5, 5
SYNTHETIC = {"peaked": 3.5, "flat": 2.0}
SYNTHETIC_VOCABULARY, SYNTHETIC_TOKENS = 151_936, 1024
STUDENT_NOISE_NATS = 0.5
"""Of the student that stands in for one, on each of the teacher's logits."""


def sample_once(folder: Path, part: str, tokens: int, seed: int) -> None:
    """SmolLM2's own samples and their whole-vocabulary scores, unless the folder has them."""
    if (folder / f"{part}.npz").exists():
        return
    from signals import sample

    from lightopd.engines.hf.engine import load_hf_engine
    from lightopd.models.load import load_model
    from lightopd.pipelines.demos.smollm2_weights import convert_gguf, find_smollm2
    from lightopd.schemas.configs import HfEngine, ModelConfig

    teacher = folder / "teacher"
    if not teacher.exists():
        convert_gguf(find_smollm2(), teacher)
    config = ModelConfig(path=str(teacher))
    drawn = sample(load_hf_engine(HfEngine(device="cpu"), config), teacher, tokens, seed)
    model, scored = load_model(config, "cpu"), []
    for one in drawn:
        ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])[None]).long()
        with torch.no_grad():
            logits_NV = model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
        scored.append(logits_NV.float().log_softmax(1).numpy())
    np.save(folder / f"{part}.npy", np.concatenate(scored))
    ids_N = np.concatenate([one.response_ids for one in drawn])
    np.savez(folder / f"{part}.npz", ids=ids_N, lengths=[len(one.response_ids) for one in drawn])


def student_ranks(teachers: Teachers, seed: int = 0) -> Callable[[Kept], NDArray[np.int64]]:
    """The place of a kept id in the student's own order, or `WIDEST` and the id where it is beyond that."""
    random, found = torch.Generator().manual_seed(seed), []
    for start in range(0, len(teachers.logprobs_NV), BLOCK):
        logits_BV = torch.from_numpy(np.array(teachers.logprobs_NV[start : start + BLOCK]))
        noise_BV = torch.randn(logits_BV.shape, generator=random).mul_(STUDENT_NOISE_NATS)
        found.append((logits_BV + noise_BV).topk(WIDEST).indices)
    ids_NK = torch.cat(found).numpy()

    def ranks(kept: Kept) -> NDArray[np.int64]:
        codes_V = np.arange(teachers.logprobs_NV.shape[1]) + WIDEST
        ends_N, coded = np.cumsum(kept.counts_N), []
        for own_K, end, count in zip(ids_NK, ends_N, kept.counts_N, strict=True):
            codes_V[own_K] = np.arange(WIDEST)
            coded.append(codes_V[kept.ids_C[end - count : end]])
            codes_V[own_K] = own_K + WIDEST
        return np.concatenate(coded)

    return ranks


def measure(calibration: Teachers, measured: Teachers) -> dict:
    """Entries, KL, bytes and decode speed by support and encoding."""
    vocabulary = measured.logprobs_NV.shape[1]
    shapes_SV = shapes(calibration, SUPPORTS)
    losses, theirs = Measure.of(measured, shapes_SV), widest(calibration)
    own, ranks, found = widest(measured), student_ranks(measured), {}
    for place, support in enumerate(SUPPORTS):
        exact = keep(measured, *own, support)
        before = keep(calibration, *theirs, support)
        ways = encodings(frequency_codes(before, vocabulary), ranks)
        rows = [
            _written(way, exact, losses, place)
            for way in ways
            if support.name in EVERY_ENCODING or way.name in CURVE
        ]
        if importlib.util.find_spec("constriction"):
            rows.append(_coded(before, exact, losses, place, vocabulary))
        found[support.name] = {
            "entries": round(len(exact.ids_C) / len(exact.counts_N), 2),
            "kl_uniform": round(losses.kl_lost(exact, exact, None), 4),
            "kl_shaped": round(losses.kl_lost(exact, exact, place), 4),
            "encodings": {row.pop("name"): row for row in rows},
        }
    return {
        "tokens": len(measured.sampled_N),
        "calibration_tokens": len(calibration.sampled_N),
        "vocabulary": vocabulary,
        "supports": found,
        "at_goals": {f"kl {goal}": bytes_at(found, goal) for goal in GOALS},
    }


def _written(way: Encoding, exact: Kept, losses: Measure, place: int) -> dict:
    stored = way.store(exact)
    content = way.write(stored)
    row = {"name": way.name, "bytes": round(len(content) / len(exact.counts_N), 2)}
    row |= {"kl_uniform": round(losses.kl_lost(exact, stored, None), 4)}
    row |= {"kl_shaped": round(losses.kl_lost(exact, stored, place), 4)}
    row |= {"largest_error": round(float(np.abs(stored.logprobs_C - exact.logprobs_C).max()), 4)}
    if way.read is not None:
        seconds = min(_seconds(way.read, content) for _ in range(REPEATS))
        row |= {"decode_tokens_per_s": round(len(exact.counts_N) / seconds)}
    return row


def _seconds(read: Callable, content: bytes, readings: int = READINGS) -> float:
    """CPU seconds of one reading, over as many as a clock can tell; other work on the machine counts less."""
    began_s = time.process_time()
    for _ in range(readings):
        read(content)
    return (time.process_time() - began_s) / readings


def _coded(before: Kept, exact: Kept, losses: Measure, place: int, vocabulary: int) -> dict:
    """By an entropy coder, in quarters of a nat, with statistics of the calibration tokens."""
    from support.entropy_coder import coded_bytes

    stored, size, seconds = coded_bytes(before, exact, vocabulary)
    num = len(exact.counts_N)
    row = {"name": "quarters, entropy coder", "bytes": round(size / num, 2)}
    row |= {"kl_shaped": round(losses.kl_lost(exact, stored, place), 4)}
    return row | {"decode_tokens_per_s": round(num / seconds)}


def measure_decoding() -> dict[str, dict]:
    """Tokens a second into arrays, by vocabulary and encoding, of 32,768 synthetic tokens with 32 entries."""
    found: dict[str, dict] = {}
    for vocabulary in (49_152, SYNTHETIC_VOCABULARY):
        made = synthetic_capture(vocabulary, 32)
        num, top_k = made.ids_NK.shape
        counts_N, lengths_R = np.full(num, top_k), np.full(num // 256, 256)
        values = (made.ids_NK.ravel(), made.logprobs_NK.ravel(), made.tail_N, made.logprobs_NK[:, 0])
        kept = Kept(counts_N, *values, lengths_R)
        ways = [way for way in encodings(np.arange(vocabulary, dtype=np.int32), None) if way.name in CURVE]
        told = {}
        for way in ways:
            if way.read is not None:
                content = way.write(way.store(kept))
                seconds = min(_seconds(way.read, content, 1) for _ in range(REPEATS))
                told[way.name] = {"bytes": round(len(content) / num, 1), "tokens_per_s": round(num / seconds)}
        found[str(vocabulary)] = told
    return found


def bytes_at(found: dict, goal: float) -> dict[str, float]:
    """Bytes by encoding where a threshold loses so much, between two that were measured (log, log)."""
    told = {}
    for name in (*CURVE, "quarters, entropy coder"):
        points = [
            (row["encodings"][name]["kl_shaped"], row["encodings"][name]["bytes"])
            for support, row in found.items()
            if support.startswith("p >") and name in row["encodings"]
        ]
        kl, sizes = np.log(np.array(sorted(points))).T
        if kl[0] <= np.log(goal) <= kl[-1]:
            told[name] = round(float(np.exp(np.interp(np.log(goal), kl, sizes))), 1)
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scores", type=Path, help="folder that keeps the samples; made where it is missing")
    parser.add_argument("--calibrate", type=int, default=2048, help="response tokens for the shape")
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens that are measured")
    parser.add_argument("--no-synthetic", action="store_true", help="SmolLM2 alone")
    parser.add_argument("--json", type=Path, help="file for the same JSON, indented")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scores = asked.scores or Path(folder)
        scores.mkdir(parents=True, exist_ok=True)
        for part, tokens, seed in (("calibration", asked.calibrate, 0), ("measured", asked.tokens, 1)):
            sample_once(scores, part, tokens, seed)
        parts = [load_teachers(scores, part) for part in ("calibration", "measured")]
        found = {"decode_top32": measure_decoding(), "smollm2": measure(*parts)}
    for name, spread in () if asked.no_synthetic else SYNTHETIC.items():
        made = [synthetic_teachers(spread, SYNTHETIC_TOKENS, SYNTHETIC_VOCABULARY, seed) for seed in (0, 1)]
        found[name] = measure(*made)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
