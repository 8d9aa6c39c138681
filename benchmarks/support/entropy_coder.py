"""Kept entries through an entropy coder (`constriction`), a candidate that only `signal_bytes.py` knows."""

# N = response tokens, C = kept entries of all positions end to end

import time

import constriction
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from support.kept_entries import Kept
from support.signal_encodings import by_id, frequency_codes, gaps, in_steps, write_plain

STEP_NATS = 1 / 4
STEPS = 128
PLACES = 12
"""Contexts of a gap: how far through its position an entry is."""
SIZES = 20
"""Symbols of a gap: its number of bits; the bits below the first are stored as they are."""


def coded_bytes(calibration: Kept, kept: Kept, vocabulary: int) -> tuple[Kept, float, float]:
    """What is stored, its bytes, and the seconds of the coder's own decoding.

    Entries ascend in codes by frequency. A gap's number of bits is coded given the entry's place in its
    position, its steps given the number of bits of its code; probabilities are those of the calibration
    tokens. Columns other than the entries are those of a shard in the same steps.
    """
    code_V = frequency_codes(calibration, vocabulary)
    known, own = (_symbols(by_id(in_steps(each, STEP_NATS), code_V)) for each in (calibration, kept))
    encoder, streams = constriction.stream.queue.RangeEncoder(), []
    for (symbols, contexts), (theirs, their_contexts), num in zip(
        own[:2], known[:2], (SIZES, STEPS), strict=True
    ):
        for context in np.unique(contexts):
            seen = np.bincount(theirs[their_contexts == context], minlength=num) + 0.1
            distribution = constriction.stream.model.Categorical(seen / seen.sum(), perfect=False)
            mine = symbols[contexts == context].astype(np.int32)
            encoder.encode(mine, distribution)
            streams.append((distribution, mine))
    words = encoder.get_compressed()
    began_s, decoder = time.perf_counter(), constriction.stream.queue.RangeDecoder(words)
    for distribution, mine in streams:
        assert (decoder.decode(distribution, len(mine)) == mine).all()
    seconds = time.perf_counter() - began_s
    stored = in_steps(kept, STEP_NATS)
    return stored, words.nbytes + own[2] / 8 + _other_columns(write_plain(stored)), seconds


def _symbols(kept: Kept) -> tuple[tuple[NDArray, NDArray], tuple[NDArray, NDArray], int]:
    """Numbers of bits and their contexts, steps and theirs, and how many plain bits stand below the first."""
    starts_N = np.cumsum(kept.counts_N) - kept.counts_N
    index_C = np.arange(len(kept.ids_C)) - np.repeat(starts_N, kept.counts_N)
    places_C = index_C * PLACES // np.repeat(kept.counts_N, kept.counts_N)
    counts_C = np.repeat(np.minimum(np.log2(kept.counts_N + 1), 9).astype(int), kept.counts_N)
    sizes_C = _num_bits(gaps(kept))
    steps_C = np.round(-kept.logprobs_C / STEP_NATS).clip(0, STEPS - 1).astype(np.int64)
    contexts_C = _num_bits(kept.ids_C) * 10 + counts_C
    return (sizes_C, places_C * 10 + counts_C), (steps_C, contexts_C), int(np.maximum(sizes_C - 1, 0).sum())


def _num_bits(values: NDArray) -> NDArray[np.int64]:
    return np.ceil(np.log2(values.astype(np.float64) + 1)).astype(np.int64)


def _other_columns(content: bytes) -> int:
    metadata = pq.read_metadata(pa.BufferReader(content))
    groups = [metadata.row_group(place) for place in range(metadata.num_row_groups)]
    chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
    entries = ("topk_ids.list.element", "topk_logprobs.list.element")
    return len(content) - sum(c.total_compressed_size for c in chunks if c.path_in_schema in entries)
