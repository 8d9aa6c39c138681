"""Tokens per second and memory of the trainer's loader.

    OMP_NUM_THREADS=1 python benchmarks/loader.py

prints one JSON line per figure. The first epoch is read at top-32 from disk to padded tensors, as `lightopd
train` reads it: SHA-256 of the bytes that are decoded, what the objective takes from the whole cache (which
looks for numbers that are not finite), the index, the shuffle, micro-batches. Against it stands `datasets`,
which reads the same columns of the same files, shuffled, into padded tensors of the same types, and checks
nothing. Its first epoch converts the files to Arrow; its later ones read that from a memory map, ours the
decoded shards that the window holds. Tokens are response tokens; seconds are CPU seconds on one thread, which
is what reading costs, and seconds on the clock with two threads, which is what one waits for. The two take
turns, each time in a new process that has read the cache once before; ratios are medians over pairs.

Memory is the peak resident set of a process that reads one epoch of a cache, against one that reads a cache
of a hundredth of its size; both shuffle in the same window, which the small cache fills.
"""

# P = prompt tokens, N = response tokens, K = cached ids at each position, B = rollouts in a micro-batch

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.peers import peer_python
from support.workers import in_process, main, peak_mib, report, write_cache

if TYPE_CHECKING:
    from lightopd.training.data.batches import StepDataset

TOP_K = 32
VOCABULARY = 49_152
LENGTHS = (64, 448)
CACHE = {"lengths": LENGTHS, "top_k": TOP_K, "vocabulary_size": VOCABULARY}
SPEED_SIZES = {"num_shards": 4, "per_shard": 512}
GROWTH_PER_SHARD = 64
GROWTH_SHARDS = (3, 300)
NUM_PAIRS = 9
BATCH = 64
MICRO_BATCH_TOKENS = 16_384
COLUMNS = ("prompt_ids", "response_ids", "loss_mask", "turns", "logprobs", "entropies")
SCORES = ("logprobs", "topk_counts", "topk_ids", "topk_logprobs", "tail_logprobs")


def open_ours(path: Path, window_gib: float) -> StepDataset:
    """The loader's dataset over a cache, opened as by a training run with a divergence over the top-k."""
    from support.synthetic_cache import open_data

    from lightopd.schemas.finetune import FinetuneConfig
    from lightopd.schemas.objectives.objective import ObjectiveConfig
    from lightopd.training.data.batches import StepDataset
    from lightopd.training.data.plan import make_plan

    finetune = FinetuneConfig(
        batch_sequences=BATCH, micro_batch_tokens=MICRO_BATCH_TOKENS, shuffle_gib=window_gib
    )
    objective = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}})
    store, index = open_data(path, objective, int(window_gib * 2**30))
    return StepDataset(make_plan(index, finetune, 0, 1), store)


def read_ours(dataset: StepDataset) -> int:
    """Response tokens of an epoch, every step of it made into tensors."""
    import torch

    from lightopd.training.data.batches import HostBatch, collate

    device, tokens = torch.device("cpu"), 0
    for step in range(len(dataset.plan.index.row_P) // BATCH):
        micro_batches = dataset[step]
        assert isinstance(micro_batches, list)
        for rows in micro_batches:
            assert isinstance(rows, HostBatch)
            tokens += len(collate(rows, device).rollouts.ids_N)
    return tokens


def read_peer(dataset: Any) -> int:
    """The same with `datasets`: batches of like length, one by one into padded tensors."""
    import numpy as np
    import torch

    def padded(pieces: list[Any]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.array(p)) for p in pieces], True)

    tokens = 0
    for batch in dataset.shuffle(seed=0).with_format("numpy").iter(batch_size=BATCH):
        lengths = [len(ids) for ids in batch["response_ids"]]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        size = MICRO_BATCH_TOKENS // (LENGTHS[1] + 64)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            padded([np.concatenate([batch["prompt_ids"][r], batch["response_ids"][r]]) for r in part]).long()
            for name in (*COLUMNS[2:], *(f"teacher_{name}" for name in SCORES if "topk" not in name)):
                padded([batch[name][row] for row in part])
            wide = [
                padded([batch[name][row].reshape(lengths[row], TOP_K) for row in part])
                for name in ("teacher_topk_ids", "teacher_topk_logprobs")
            ]
            wide[0].long()
            tokens += sum(lengths[row] for row in part)
    return tokens


def open_peer(path: Path, arrow: str) -> Any:
    """The two folders side by side; `arrow` is where their conversion is kept."""
    import datasets

    datasets.disable_progress_bars()
    files = {
        "rollouts": (path / "rollouts", COLUMNS, ""),
        "teacher": (path / "signals" / "teacher", SCORES, "teacher_"),
    }
    parts = []
    for folder, columns, prefix in files.values():
        shards = [str(file) for file in sorted(folder.glob("*.parquet"))]
        part = datasets.Dataset.from_parquet(shards, columns=list(columns), cache_dir=arrow)
        parts.append(part.rename_columns({name: prefix + name for name in columns} if prefix else {}))
    return datasets.concatenate_datasets(parts, axis=1)


def work_cpu(contender: str, path: Path) -> tuple[float, float]:
    """Tokens per CPU second of a first epoch and of a second, after a round that warms up."""
    one_round(contender, path, time.process_time)
    return one_round(contender, path, time.process_time)


def work_wall(contender: str, path: Path) -> tuple[float, float]:
    """The same per second on the clock."""
    one_round(contender, path, time.perf_counter)
    return one_round(contender, path, time.perf_counter)


def one_round(contender: str, path: Path, clock: Callable[[], float]) -> tuple[float, float]:
    """Tokens per second of a first epoch and of a second; what they read is freed at the end."""
    with tempfile.TemporaryDirectory() as arrow:
        start_s = clock()
        dataset: Any = open_peer(path, arrow) if contender == "datasets" else open_ours(path, 2.0)
        read: Callable[[Any], int] = read_peer if contender == "datasets" else read_ours
        first = read(dataset) / (clock() - start_s)
        start_s = clock()
        return first, read(dataset) / (clock() - start_s)


def work_memory(contender: str, path: Path) -> list[float]:
    """Peak resident set in MiB after one epoch."""
    assert contender == "ours"
    read_ours(open_ours(path, window_bytes(path) / 2**30))
    return [peak_mib()]


def window_bytes(path: Path) -> int:
    """Decoded size of as many shards as the small cache has."""
    from lightopd.cache.store import open_cache
    from lightopd.training.data.shard_store import index_cache

    index = index_cache(open_cache(path), ("teacher",), ("teacher",))
    return int(index.bytes_S[: GROWTH_SHARDS[0]].sum())


def report_speed(path: Path, measure: str, threads: int, unit: str) -> None:
    python = str(peer_python())
    pairs = [
        (
            in_process(__file__, measure, "ours", path, threads=threads),
            in_process(__file__, measure, "datasets", path, python, threads),
        )
        for _ in range(NUM_PAIRS)
    ]
    for name, epoch, other, goal, what in (
        ("first_epoch_vs_datasets", 0, 0, ">= 3", "datasets, its conversion to Arrow included"),
        ("first_epoch_vs_converted", 0, 1, "-", "datasets, converted before"),
        ("later_epochs_vs_datasets", 1, 1, ">= 3", "datasets, memory-mapped Arrow"),
    ):
        rates = [(ours[epoch], peer[other]) for ours, peer in pairs]
        ours, against = (statistics.median(side) for side in zip(*rates, strict=True))
        ratio = statistics.median(a / b for a, b in rates)
        report(f"loader_{measure}_{name}", ours, against, ratio, goal, unit, what)
    first = statistics.median(ours[0] for ours, _ in pairs)
    report(f"loader_{measure}_first_epoch", first, 1e6, first / 1e6, ">= 1", unit, "one million")


def report_growth(folder: Path) -> None:
    peaks = []
    for shards in GROWTH_SHARDS:
        write_cache(folder / str(shards), **CACHE, num_shards=shards, per_shard=GROWTH_PER_SHARD)
        peaks += in_process(__file__, "memory", "ours", folder / str(shards))
    small, large = peaks
    peer = f"ours, a cache {GROWTH_SHARDS[1] // GROWTH_SHARDS[0]} times smaller"
    report("loader_memory_growth", large, small, large / small, "<= 1.2", "MiB", peer)


def report_all(folder: Path) -> None:
    path = folder / "speed"
    write_cache(path, **CACHE, **SPEED_SIZES)
    report_speed(path, "cpu", 1, "response tokens per CPU second, one thread")
    report_speed(path, "wall", 2, "response tokens per second, two threads")
    report_growth(folder)


if __name__ == "__main__":
    main(__doc__, {"cpu": work_cpu, "wall": work_wall, "memory": work_memory}, report_all)
