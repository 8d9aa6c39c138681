"""Which column layout should the cache use for the teacher's top-k?

Five layouts hold the same tokens. The script measures bytes per token, encode and decode speed with
integrity checks, and runs the SQL that turns each layout into one row per (rollout, position, rank).
It prints one JSON line per figure; `docs/decisions/0001-cache-layout.md` is the decision drawn from it.

    python benchmarks/layout.py
    python benchmarks/layout.py --capture topk.npz     # ids and logprobs of a real model instead

Arrow, torch and DuckDB run on one thread; speeds are medians of interleaved repeats. "Checked" means
SHA-256 of the file and the CRC-32 of every page, both verified before a value is used.
"""

# N = tokens of all rollouts, K = cached teacher tokens; nats throughout

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from support.layout_candidates import (
    NAMES,
    ROWS_PER_GROUP,
    SPLIT,
    TOKENS_PER_ROLLOUT,
    Capture,
    Layout,
    Pair,
    layouts,
    load_capture,
    read,
    rollout_bounds,
    round_to_half,
    synthetic_capture,
    to_list_column,
    write,
)


def interleaved(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each action over 5 rounds that run all of them, after one round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(6):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def speeds(num: int, actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Tokens per second of each action."""
    return {name: num / seconds for name, seconds in interleaved(actions).items()}


def report(name: str, values: dict[str, float], unit: str, goal: float | None = None) -> None:
    """Print the first value, ours, against every other one; ratio is ours / against."""
    ours, *others = values.items()
    for peer, value in others:
        figure = {"ours": ours[1], "against": value, "ratio": ours[1] / value}
        rounded = {key: float(f"{number:.4g}") for key, number in figure.items()}
        print(json.dumps({"name": name} | rounded | {"goal": goal, "unit": unit, "peer": peer}), flush=True)


def topk_bytes(path: Path, num_tokens: int) -> float:
    """Bytes per token of ids, top-k logprobs and counts, as compressed on disk."""
    metadata = pq.read_metadata(path)
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(metadata.num_columns))
    size_bytes: int = sum(c.total_compressed_size for c in chunks if c.path_in_schema.startswith("topk_"))
    return size_bytes / num_tokens


def compare_layouts(capture: Capture, label: str, folder: Path) -> None:
    """Bytes, encode speed and checked decode speed of E beside each other candidate."""
    num, top_k = capture.ids_NK.shape
    all_layouts = {layout.name: layout for layout in layouts(top_k)}
    paths = {name: folder / f"{name}.parquet" for name in all_layouts}

    def encode(layout: Layout) -> None:
        write(layout.build(capture), layout, paths[layout.name])

    encoded = speeds(num, {name: partial(encode, layout) for name, layout in all_layouts.items()})
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}

    def decode(layout: Layout) -> Pair:
        return layout.decode(read(paths[layout.name], digests[layout.name]))

    decoded = speeds(num, {name: partial(decode, layout) for name, layout in all_layouts.items()})
    for layout in all_layouts.values():
        ids, logprobs = decode(layout)
        check_same(layout.name, ids.numpy(), logprobs.numpy(), capture)
    sizes = {name: topk_bytes(path, num) for name, path in paths.items()}
    report(f"top-k bytes, {label}", sizes, "B/token", {32: 100.0, 64: 200.0}.get(top_k))
    report(f"encode, {label}", encoded, "tokens/s", {32: 4e5}.get(top_k))
    report(f"decode checked, {label}", decoded, "tokens/s", {32: 1e6}.get(top_k))


def check_same(what: str, ids: np.ndarray, logprobs: np.ndarray, capture: Capture) -> None:
    """Refuse a round trip that does not give back the written values, in order, bit for bit."""
    same = np.array_equal(ids, capture.ids_NK.ravel())
    if not (same and np.array_equal(logprobs, round_to_half(capture.logprobs_NK).ravel())):
        raise ValueError(f"{what} does not give back the ids and log-probabilities that were written")


def with_logprobs(table: pa.Table, values: np.ndarray) -> pa.Table:
    """The chosen layout's table with other values in `topk_logprobs`."""
    column = to_list_column(rollout_bounds(*values.shape), values.ravel())
    return table.set_column(table.column_names.index(NAMES[1]), NAMES[1], column)


def settings_variants(capture: Capture, layout: Layout) -> dict[str, tuple[pa.Table, dict[str, Any]]]:
    """Table and writer changes of the chosen settings and of single departures from them."""
    chosen = layout.build(capture)
    half = with_logprobs(chosen, capture.logprobs_NK.astype(np.float16))
    ids, logprobs = layout.split
    defaults = {"compression": "snappy", "compression_level": None, "use_dictionary": True}
    return {
        "chosen": (chosen, {}),
        "float32 not rounded": (with_logprobs(chosen, capture.logprobs_NK), {}),
        "halffloat plain": (half, {"column_encoding": {ids: SPLIT}}),
        "halffloat split, unreadable in DuckDB": (half, {}),
        "ids plain": (chosen, {"column_encoding": {logprobs: SPLIT}}),
        "ids delta": (chosen, {"column_encoding": {ids: "DELTA_BINARY_PACKED", logprobs: SPLIT}}),
        "ids dictionary": (chosen, {"column_encoding": {logprobs: SPLIT}, "use_dictionary": [ids]}),
        "zstd 1": (chosen, {"compression_level": 1}),
        "zstd 9": (chosen, {"compression_level": 9}),
        "pyarrow defaults": (chosen, defaults | {"column_encoding": None, "write_statistics": True}),
    }


def compare_settings(capture: Capture, label: str, folder: Path) -> None:
    """The chosen writer settings beside single changes: value type, compression level, id encoding."""
    num, top_k = capture.ids_NK.shape
    layout = layouts(top_k)[0]
    variants = settings_variants(capture, layout)
    paths = {name: folder / f"variant-{index}.parquet" for index, name in enumerate(variants)}
    writes = {
        n: partial(write, table, layout, paths[n], **changes) for n, (table, changes) in variants.items()
    }
    written = speeds(num, writes)
    read_back = speeds(num, {name: partial(read, path) for name, path in paths.items()})
    sizes = {name: topk_bytes(path, num) for name, path in paths.items()}
    report(f"settings: top-k bytes, {label}", sizes, "B/token")
    report(f"settings: write, {label}", written, "tokens/s")
    report(f"settings: read, {label}", read_back, "tokens/s")


def compare_row_groups(capture: Capture, label: str, folder: Path) -> None:
    """Bytes per token, and milliseconds to read one row group, for row groups of several sizes."""
    num, top_k = capture.ids_NK.shape
    layout = layouts(top_k)[0]
    table = layout.build(capture)
    paths = {
        f"{rows} rows": folder / f"rows-{rows}.parquet" for rows in (ROWS_PER_GROUP, 1, 4, 8, 32, 64, 192)
    }
    for name, path in paths.items():
        write(table, layout, path, row_group_size=int(name.split()[0]))
    sizes = {name: topk_bytes(path, num) for name, path in paths.items()}
    files = {name: pq.ParquetFile(path, page_checksum_verification=True) for name, path in paths.items()}
    seconds = interleaved({name: partial(file.read_row_group, 0) for name, file in files.items()})
    for file in files.values():
        file.close()
    report(f"row group: top-k bytes, {label}", sizes, "B/token")
    report(f"row group: read one, {label}", {name: s * 1e3 for name, s in seconds.items()}, "ms")


def compare_limits(capture: Capture, label: str, folder: Path) -> None:
    """Checked decode beside what the machine allows, with the cost of each check."""
    num, top_k = capture.ids_NK.shape
    layout = layouts(top_k)[0]
    path = folder / "limits.parquet"
    write(layout.build(capture), layout, path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    columns = (capture.ids_NK, round_to_half(capture.logprobs_NK))
    planes = b"".join(np.ascontiguousarray(v.reshape(-1, 1).view(np.uint8).T).tobytes() for v in columns)
    packed = pa.Codec("zstd", 3).compress(planes, asbytes=True)
    tensors = layout.decode(read(path))
    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: layout.decode(read(path, digest)),
        "without SHA-256": lambda: layout.decode(read(path)),
        "without SHA-256 and page checksums": lambda: layout.decode(read(path, page_checksums=False)),
        "two threads": lambda: layout.decode(read(path, digest, threads=True)),
        "SHA-256 of the file alone": lambda: hashlib.sha256(data).hexdigest(),
        "zstd of the same byte planes alone": lambda: pa.decompress(packed, len(planes), codec="zstd"),
        "copy of the tensors alone": lambda: [tensor.clone() for tensor in tensors],
    }
    limits = speeds(num, actions) | speeds(-(-num // 16), {"Python lists": partial(through_python, path)})
    report(f"decode checked and limits, {label}", limits, "tokens/s", 1e6)


def compare_faults(capture: Capture, label: str, folder: Path) -> None:
    """Of 60 files with one bit flipped in a page, how many the reader refuses, with and without checks."""
    layout = layouts(capture.ids_NK.shape[1])[0]
    path = folder / "whole.parquet"
    write(layout.build(capture), layout, path)
    data = path.read_bytes()
    pages_end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    rng = np.random.default_rng(0)
    caught = {"page checksums": 0.0, "no page checksums": 0.0}
    for place in rng.integers(4, pages_end, 60):
        broken = bytearray(data)
        broken[place] ^= 1 << int(rng.integers(8))
        (folder / "broken.parquet").write_bytes(broken)
        for name in caught:
            caught[name] += is_refused(folder / "broken.parquet", name == "page checksums")
    report(
        f"flipped bits caught, {label}", {name: float(count) for name, count in caught.items()}, "of 60", 60
    )


def is_refused(path: Path, page_checksums: bool) -> bool:
    try:
        read(path, page_checksums=page_checksums)
    except (OSError, pa.ArrowException):
        return True
    return False


def through_python(path: Path) -> list[torch.Tensor]:
    """A sixteenth of a shard by way of Python lists: what a list column costs without its buffer."""
    table = pq.read_table(path, columns=list(NAMES))
    table = table.slice(0, -(-len(table) // 16))
    return [torch.tensor(row) for name in NAMES for row in table.column(name).to_pylist()]


def pad_ragged(values: torch.Tensor, counts_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Spread the flat values of N positions over a zero-filled rectangle [N, K]."""
    is_entry_NK = torch.arange(top_k) < counts_N[:, None]
    return values.new_zeros(is_entry_NK.shape).masked_scatter_(is_entry_NK, values)


def compare_padding(capture: Capture, label: str, _folder: Path) -> None:
    """Cost of padding a support that varies (p > 0.001, up to K) against copying a fixed one."""
    num, top_k = capture.ids_NK.shape
    keep_NK = torch.from_numpy(capture.logprobs_NK) > np.log(1e-3)
    full = torch.from_numpy(capture.ids_NK), torch.from_numpy(capture.logprobs_NK)
    flat, counts_N = [tensor[keep_NK] for tensor in full], keep_NK.sum(dim=1)
    actions: dict[str, Callable[[], object]] = {
        "ragged": lambda: [pad_ragged(tensor, counts_N, top_k) for tensor in flat],
        "copy of a fixed support": lambda: [tensor.clone() for tensor in full],
    }
    report(f"pad to [N, K], {label}", speeds(num, actions), "tokens/s")


def compare_sql(capture: Capture, label: str, folder: Path) -> None:
    """Tokens per second from each layout to sums over one row per (rollout, position, rank) in DuckDB."""
    num, top_k = capture.ids_NK.shape
    actions: dict[str, Callable[[], object]] = {}
    with duckdb.connect(config={"threads": 1}) as connection:
        for layout in layouts(top_k):
            path = folder / f"{layout.name}.parquet"
            write(layout.build(capture), layout, path)
            rows = layout.sql.replace("from shard", f"from read_parquet('{path}')")
            check_sql(connection, layout, rows, capture)
            sums = f"select sum(token_id * (position + rank)), sum(logprob) from ({rows})"
            actions[layout.name] = partial(run_query, connection, sums)
        report(f"SQL unnest, {label}", speeds(num, actions), "tokens/s")


def run_query(connection: Any, query: str) -> object:
    return connection.execute(query).fetchall()


def check_sql(connection: Any, layout: Layout, rows: str, capture: Capture) -> None:
    """The query gives every written entry under the right position and rank."""
    num, top_k = capture.ids_NK.shape
    found = connection.execute(f"select * from ({rows})").fetchnumpy()
    check_same(layout.name, found["token_id"], found["logprob"].astype(np.float32), capture)
    positions = np.repeat(np.arange(num) % TOKENS_PER_ROLLOUT, top_k)
    ranks = np.tile(np.arange(top_k), num)
    if not (np.array_equal(found["position"], positions) and np.array_equal(found["rank"], ranks)):
        raise ValueError(f"the SQL of {layout.name} numbers positions or ranks wrongly")


def check_polars(capture: Capture, _label: str, folder: Path) -> None:
    """Polars reads the chosen layout and unnests it to the same rows."""
    layout = layouts(capture.ids_NK.shape[1])[0]
    path = folder / "polars.parquet"
    write(layout.build(capture), layout, path)
    counts = pl.col("topk_counts").list
    position = counts.eval(pl.int_range(pl.len()).repeat_by(pl.element()).explode()).alias("position")
    rank = counts.eval(pl.int_ranges(0, pl.element()).explode()).alias("rank")
    frame = pl.scan_parquet(path).select("rollout_id", position, rank, *NAMES)
    found = frame.explode("position", "rank", *NAMES).collect()
    check_same("Polars", found[NAMES[0]].to_numpy(), found[NAMES[1]].to_numpy(), capture)


def report_rounding(capture: Capture, label: str, _folder: Path) -> None:
    """Error of float16 rounding on the values and on KL(teacher || student) over k+1 outcomes, in nats.

    The student is the teacher with noise of 0.3 nats on every outcome. The masses of a rounded teacher
    do not sum to one, so its KL to anything can fall below zero until it is renormalised.
    """
    exact = torch.from_numpy(np.column_stack([capture.logprobs_NK, capture.tail_N])).double().log_softmax(1)
    stored = torch.cat([exact[:, :-1].float().half().double(), exact[:, -1:]], dim=1)
    error = (stored - exact).abs()[:, :-1]
    report(f"float16 error max, {label}", {"": error.max().item(), "goal": 0.01}, "nats", 0.01)
    report(f"float16 error mean, {label}", {"": error.mean().item(), "goal": 0.01}, "nats", 0.01)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = (exact + 0.3 * noise).log_softmax(1)
    kl = kl_divergence(exact, student)
    for name, teacher in (("as stored", stored), ("renormalised", stored.log_softmax(1))):
        shift = (kl_divergence(teacher, student) - kl).abs()
        for how, value in (("mean", shift.mean()), ("max", shift.max())):
            values = {"": value.item(), "mean KL": kl.mean().item()}
            report(f"KL shift {how}, {name}, {label}", values, "nats")
        lowest = kl_divergence(teacher, exact).min().item()
        report(
            f"KL to the exact teacher, lowest, {name}, {label}",
            {"": lowest, "mean KL": kl.mean().item()},
            "nats",
        )


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capture", type=Path, help="npz with ids (N, >= 64) and logprobs (N, >= 64)")
    capture_path = parser.parse_args().capture
    torch.set_num_threads(1)
    sources: dict[str, Callable[[int], Capture]] = {"captured": partial(load_capture, capture_path)}
    if capture_path is None:
        sources = {f"V={vocab}": partial(synthetic_capture, vocab) for vocab in (49_152, 151_936)}
    sections = (
        compare_settings,
        compare_row_groups,
        compare_limits,
        compare_faults,
        compare_sql,
        check_polars,
        compare_padding,
        report_rounding,
    )
    with tempfile.TemporaryDirectory() as name:
        for source, make in sources.items():
            for top_k in (8, 32, 64):
                compare_layouts(make(top_k), f"{source}, k={top_k}", Path(name))
            for section in sections:
                section(make(32), f"{source}, k=32", Path(name))


if __name__ == "__main__":
    main()
