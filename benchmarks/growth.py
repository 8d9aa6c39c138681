"""Does a cache that is ten times larger cost ten times as much, and no more memory?

    OMP_NUM_THREADS=1 python benchmarks/growth.py --tokens 10000000

writes two random caches with the package's own writers, of so many response tokens and of a tenth, and prints
one JSON line. Three processes measure each cache: the index and five named queries; `verify`; the start of
training (the first reading: checksums, every row checked, what the objective takes from the whole cache) and
what the loader takes for an optimiser step. `ours` is the larger cache, `against` the smaller, `ratio` one by
the other. Caches have whole shards: `tokens` by `against_tokens` is what linear means, and for memory and for
a step 1 is flat. Seconds are CPU seconds, what it costs however busy the machine is, without imports, and on
one thread but for the queries: these run as `lightopd sql` runs them, where DuckDB takes a thread for each
core, unless `--threads` says otherwise, and have seconds on the clock (`query_NAME_clock_s`) too. Memory is
the peak resident set of the process that did the work, in MiB, imports included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from support.workers import in_process, main, peak_mib, write_cache

TOP_K = 8
PER_SHARD = 256
LENGTHS = (64, 448)
VOCABULARY = 49_152
QUERIES = ("truncated_share", "gap_by_domain", "gap_by_position", "tail_mass", "lengths")
WINDOW_GIB = 0.05
"""Smaller than both caches, as a window is smaller than a cache that grows."""
BATCH = 64
STEPS = 24


def work_sql(threads: str, path: Path) -> dict[str, float]:
    """Seconds to build the index, and of each named query with its views; no threads: as many as `sql`."""
    from lightopd.cache.index import build_index, connect
    from lightopd.cache.store import open_cache
    from lightopd.inspection.queries import named_query

    settings: dict[str, str | int] = {"threads": int(threads)} if threads else {}
    figures = {"index_s": _seconds(lambda: build_index(open_cache(path)))}

    def run(name: str) -> None:
        found = named_query(name)
        with connect(open_cache(path, incomplete=True), settings) as connection:
            # DuckDB takes no value that a statement does not name.
            given = {key: value for key, value in found.values({}).items() if f"${key}" in found.sql}
            connection.execute(found.sql, given or None).fetchall()

    for name in QUERIES:
        start_s = time.perf_counter()
        figures[f"query_{name}_s"] = _seconds(partial(run, name))
        figures[f"query_{name}_clock_s"] = time.perf_counter() - start_s
    return {**figures, "sql_peak_mib": peak_mib()}


def work_verify(case: str, path: Path) -> dict[str, float]:
    """Seconds of `verify`, which must find nothing."""
    from lightopd.cache.verify import verify

    def run() -> None:
        if findings := verify(path):
            sys.exit(f"{len(findings)} findings, such as {findings[0]}")

    return {"verify_s": _seconds(run), "verify_peak_mib": peak_mib()}


def work_train(case: str, path: Path) -> dict[str, float]:
    """Seconds until the first step can be read, and mean seconds of a step of the loader."""
    import torch
    from support.synthetic_cache import open_data

    from lightopd.schemas.finetune import FinetuneConfig
    from lightopd.schemas.objectives.objective import ObjectiveConfig
    from lightopd.training.data.batches import HostBatch, StepDataset, collate
    from lightopd.training.data.plan import make_plan

    finetune = FinetuneConfig(batch_sequences=BATCH, micro_batch_tokens=16_384, shuffle_gib=WINDOW_GIB)
    objective = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}})
    start_s = time.process_time()
    store, index = open_data(path, objective, int(WINDOW_GIB * 2**30))
    dataset = StepDataset(make_plan(index, finetune, 0, 1), store)
    started_s, steps = time.process_time() - start_s, []
    for step in range(STEPS):
        start_s = time.process_time()
        for rows in dataset[step]:
            assert isinstance(rows, HostBatch)
            collate(rows, torch.device("cpu"))
        steps.append(time.process_time() - start_s)
    mean_s = statistics.fmean(steps)
    return {"train_start_s": started_s, "train_step_s": mean_s, "train_peak_mib": peak_mib()}


def _seconds(run: Callable[[], Any]) -> float:
    start_s = time.process_time()
    run()
    return time.process_time() - start_s


def measure(path: Path, threads: str) -> dict[str, float]:
    """Every figure of one cache."""
    found: dict[str, float] = {}
    for name in MEASURES:
        found |= in_process(__file__, name, threads, path)
    return found


def report_all(folder: Path, tokens: int, threads: str, per_shard: int) -> None:
    """One JSON line: each figure of the larger cache, of the smaller one, and their ratio."""
    tokens_per_shard = per_shard * sum(LENGTHS) // 2
    sizes = [max(1, round(size / tokens_per_shard)) for size in (tokens / 10, tokens)]
    figures = []
    for shards in sizes:
        path = folder / str(shards)
        options = {"lengths": LENGTHS, "top_k": TOP_K, "vocabulary_size": VOCABULARY}
        write_cache(path, **options, num_shards=shards, per_shard=per_shard)
        figures.append(measure(path, threads))
    small, large = figures
    told = {
        name: {
            "ours": round(value, 3),
            "against": round(small[name], 3),
            "ratio": round(value / small[name], 2),
        }
        for name, value in large.items()
    }
    of = {
        "tokens": sizes[1] * tokens_per_shard,
        "against_tokens": sizes[0] * tokens_per_shard,
        "top_k": TOP_K,
    }
    print(json.dumps({"name": "growth", **of, "shards": sizes[1], "figures": told}), flush=True)


MEASURES = {"sql": work_sql, "verify": work_verify, "train": work_train}

if __name__ == "__main__":
    if "--worker" in sys.argv:
        main(__doc__, MEASURES, lambda folder: None)
    else:
        parser = argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--tokens", type=int, default=1_000_000, help="Response tokens of the larger cache."
        )
        parser.add_argument("--folder", help="Where the caches are written for a while; 100 bytes a token.")
        parser.add_argument("--threads", type=int, help="DuckDB's; left out, as `lightopd sql` takes them.")
        parser.add_argument("--per-shard", type=int, default=PER_SHARD, help="Rollouts in a shard.")
        chosen = parser.parse_args()
        threads = "" if chosen.threads is None else str(chosen.threads)
        with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
            report_all(Path(temporary), chosen.tokens, threads, chosen.per_shard)
