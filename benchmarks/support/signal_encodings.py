"""Ways to write a signal's kept entries, for `signal_bytes.py`: a whole file each, and the way back."""

# N = response tokens, C = kept entries of all positions end to end, V = vocabulary; nats

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from support.kept_entries import Kept

from lightopd.cache.shards import DICTIONARY_COLUMNS, ROWS_PER_GROUP, TOKENS_PER_GROUP, WRITE_OPTIONS
from lightopd.cache.tables import flat_column
from lightopd.schemas.cache import list_of

SPLIT = "BYTE_STREAM_SPLIT"
Entries = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way: what is stored of the log-probabilities, the file, and ids and log-probabilities out of it."""

    name: str
    store: Callable[[Kept], Kept]
    write: Callable[[Kept], bytes]
    read: Callable[[bytes], Entries] | None
    """None where the way back was not written."""


def in_half(kept: Kept) -> Kept:
    """Top-k log-probabilities at float16 values; the tail as it is."""
    return replace(kept, logprobs_C=kept.logprobs_C.astype(np.float16).astype(np.float32))


def in_steps(kept: Kept, step_nats: float) -> Kept:
    """Top-k log-probabilities and tail at whole multiples of a step: none is off by more than half of it."""
    rounded = [np.round(each / step_nats) * step_nats for each in (kept.logprobs_C, kept.tails_N)]
    return replace(kept, logprobs_C=rounded[0].astype(np.float32), tails_N=rounded[1].astype(np.float32))


def by_id(kept: Kept, code_V: NDArray[np.int32] | None) -> Kept:
    """Entries in ascending order of ids, or of the codes that stand for them."""
    ids_C = kept.ids_C if code_V is None else code_V[kept.ids_C]
    order_C = np.lexsort((ids_C, kept.position_C))
    return replace(kept, ids_C=ids_C[order_C], logprobs_C=kept.logprobs_C[order_C])


def gaps(kept: Kept) -> NDArray[np.int32]:
    """Differences of the ids to the entry before, within a position."""
    found_C = np.diff(kept.ids_C, prepend=0)
    starts = (np.cumsum(kept.counts_N) - kept.counts_N)[kept.counts_N > 0]
    found_C[starts] = kept.ids_C[starts]
    return found_C


def frequency_codes(calibration: Kept, vocabulary: int) -> NDArray[np.int32]:
    """The place of each id in a list of ids, those most often kept first: int32 [V]."""
    counts_V = np.bincount(calibration.ids_C, minlength=vocabulary)
    code_V = np.empty(vocabulary, np.int32)
    code_V[np.argsort(-counts_V, kind="stable")] = np.arange(vocabulary, dtype=np.int32)
    return code_V


def encodings(code_V: NDArray[np.int32], student_code: Callable[[Kept], NDArray] | None) -> list[Encoding]:
    """Every way that is compared; the first four are what the cache can write."""
    eighths = partial(in_steps, step_nats=1 / 8)
    steps = {"sixteenths": 1 / 16, "eighths": 1 / 8, "quarters": 1 / 4}
    found = [Encoding("float16", in_half, write_plain, read_plain)]
    found += [
        Encoding(name, partial(in_steps, step_nats=step), write_plain, read_plain)
        for name, step in steps.items()
    ]
    for name, options in {
        "ids plain": {"ids": "PLAIN"},
        "ids delta packed": {"ids": "DELTA_BINARY_PACKED"},
        "ids dictionary": {"ids": "DICTIONARY"},
        "zstd 1": {"level": 1},
        "zstd 9": {"level": 9},
        "zstd 19": {"level": 19},
    }.items():
        found.append(Encoding(f"eighths, {name}", eighths, partial(write_plain, **options), read_plain))
    split = Encoding("eighths, ids in 16 bits and a rest", eighths, write_17_bits, None)
    coded = partial(write_bytes, of_ids=lambda kept: code_V[kept.ids_C])
    found += [
        split,
        Encoding("eighths, ids by frequency", eighths, coded, None),
        Encoding("eighths, ids by frequency, drops", eighths, partial(coded, drops=True), None),
        Encoding("eighths, by id, gaps", eighths, partial(write_gaps, code_V=None), read_gaps),
        Encoding(
            "quarters, by id, gaps",
            partial(in_steps, step_nats=1 / 4),
            partial(write_gaps, code_V=None),
            None,
        ),
        Encoding("eighths, by frequency, gaps", eighths, partial(write_gaps, code_V=code_V), None),
        Encoding(
            "quarters, by frequency, gaps",
            partial(in_steps, step_nats=1 / 4),
            partial(write_gaps, code_V=code_V),
            None,
        ),
    ]
    if student_code is not None:
        found.append(
            Encoding(
                "eighths, ids as the student's ranks",
                eighths,
                partial(write_bytes, of_ids=student_code),
                None,
            )
        )
    return found


def write_plain(kept: Kept, ids: str = SPLIT, level: int = 3) -> bytes:
    """The columns of a signal's shard, with the options of the cache's writer."""
    columns = {"topk_ids": kept.ids_C, "topk_logprobs": kept.logprobs_C}
    return _file(kept, columns, {"topk_ids": ids, "topk_logprobs": SPLIT}, level)


def read_plain(content: bytes) -> Entries:
    """Ids and log-probabilities, every page's checksum compared."""
    return tuple(_columns(content, ("topk_ids", "topk_logprobs")))


def write_bytes(kept: Kept, of_ids: Callable[[Kept], NDArray], drops: bool = False) -> bytes:
    """Codes of 32 bits for ids, best first, and steps of 8 bits or how many more than the entry before."""
    steps_C = _steps(kept)
    if drops:
        steps_C = gaps(replace(kept, ids_C=steps_C.astype(np.int32))).astype(np.uint8)
    return _file(
        kept, {"topk_codes": of_ids(kept).astype(np.int32), "topk_steps": steps_C}, {"topk_codes": SPLIT}
    )


def write_17_bits(kept: Kept) -> bytes:
    """Low 16 bits of ids, and the rest in bits of their own."""
    low, rest = (kept.ids_C & 0xFFFF).astype(np.int32), kept.ids_C >> 16
    columns = {"low": low, "rest": rest.astype(np.int32), "topk_logprobs": kept.logprobs_C}
    return _file(kept, columns, {"low": SPLIT, "rest": "DELTA_BINARY_PACKED", "topk_logprobs": SPLIT})


def write_gaps(kept: Kept, code_V: NDArray[np.int32] | None) -> bytes:
    """Ascending ids, or codes, as gaps of 32 bits; log-probabilities as steps of 8 bits."""
    sorted_ = by_id(kept, code_V)
    return _file(sorted_, {"topk_gaps": gaps(sorted_), "topk_steps": _steps(sorted_)}, {"topk_gaps": SPLIT})


def read_gaps(content: bytes) -> Entries:
    """Ids and log-probabilities, best first again."""
    gaps_C, steps_C, counts_N = _columns(content, ("topk_gaps", "topk_steps", "topk_counts"))
    summed_C = np.cumsum(gaps_C, dtype=np.int64)
    starts_N = np.cumsum(counts_N) - counts_N
    base_N = np.where(starts_N > 0, summed_C[starts_N - 1], 0)
    places_C = np.repeat(np.arange(len(counts_N), dtype=np.int64) << 32, counts_N)
    keys_C = places_C | (steps_C.astype(np.int64) << 24) | (summed_C - np.repeat(base_N, counts_N))
    keys_C.sort()
    return (keys_C & 0xFFFFFF).astype(np.int32), ((keys_C >> 24) & 0xFF).astype(np.float32) / -8


def step_of(kept: Kept) -> float:
    """The step that log-probabilities are multiples of: the largest of a few."""
    return next(s for s in (1 / 4, 1 / 8, 1 / 16) if np.allclose(np.mod(kept.logprobs_C, s), 0))


def _steps(kept: Kept) -> NDArray[np.uint8]:
    return np.round(-kept.logprobs_C / step_of(kept)).clip(0, 255).astype(np.uint8)


def _columns(content: bytes, names: tuple[str, ...]) -> list[NDArray[Any]]:
    source = pa.BufferReader(content)
    table = pq.read_table(source, columns=list(names), page_checksum_verification=True, use_threads=False)
    return [flat_column(table.column(name))[0] for name in names]


def _file(kept: Kept, entries: Mapping[str, NDArray], codes: Mapping[str, str], level: int = 3) -> bytes:
    """A shard with these columns in place of ids and log-probabilities; the rest as the cache has it."""
    offsets_R = np.concatenate([[0], np.cumsum(kept.lengths_R)])
    starts_N = np.concatenate([[0], np.cumsum(kept.counts_N)])
    rows = {
        "logprobs": (offsets_R, kept.sampled_logprobs_N),
        "topk_counts": (offsets_R, kept.counts_N.astype(np.int32)),
        "tail_logprobs": (offsets_R, kept.tails_N),
        **{name: (starts_N[offsets_R], values) for name, values in entries.items()},
    }
    random = np.random.default_rng(0)
    names = [random.bytes(16).hex() for _ in kept.lengths_R]
    columns = {"rollout_id": pa.array(names)} | {n: _list(o, v) for n, (o, v) in rows.items()}
    codes = {"logprobs": SPLIT, "tail_logprobs": SPLIT, **codes}
    dictionary = [
        f"{n}.list.element" for n in columns if n in DICTIONARY_COLUMNS or codes.get(n) == "DICTIONARY"
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns),
        sink,
        row_group_size=max(ROWS_PER_GROUP, TOKENS_PER_GROUP * len(names) // max(1, len(kept.counts_N))),
        use_dictionary=dictionary,
        column_encoding={f"{n}.list.element": code for n, code in codes.items() if code != "DICTIONARY"},
        **{**WRITE_OPTIONS, "compression_level": level},
    )
    return sink.getvalue().to_pybytes()


def _list(offsets: NDArray, values: NDArray) -> pa.ListArray:
    flat = pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=list_of(flat.type))
