"""What tests say of runs of the trainer: their rows, their weights, and whether two are the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightopd.objectives.base.batch import BatchTotals
from lightopd.schemas.finetune import OptimizerConfig
from lightopd.training.data.batches import collate, collect_rows
from lightopd.training.data.plan import pack
from lightopd.training.data.shard_store import FirstReading, index_cache
from lightopd.training.measures.metrics_file import read_metrics

CLOCKED = ("seconds", "tokens_per_second")
"""Columns that no two runs share."""
SAMPLED = {"target": "log_ratio"}
REVERSE_KL = {"target": {"kind": "divergence"}, "token_weights": [{"kind": "ratio", "cap": 2.0}]}
# Adam divides by the root of its second moment: a larger floor keeps noise of near-zero gradients small.
CALM = OptimizerConfig(lr=1e-3, eps=1e-3)


def rows_of(result):
    rows = read_metrics(result.student.parent / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in CLOCKED} for row in rows]


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_same_bits(one, other):
    assert rows_of(one) == rows_of(other)
    left, right = weights_of(one.student), weights_of(other.student)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def assert_close(one, other, tolerance=1e-6):
    for left, right in zip(rows_of(one), rows_of(other), strict=True):
        assert left == pytest.approx(right, rel=tolerance, abs=tolerance)
    left, right = weights_of(one.student), weights_of(other.student)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def micro_batches(data, budget, is_packed=False):
    """All rollouts of a store as the micro-batches of one step, in either layout."""
    store, index = data
    row_tokens = int(index.lengths_P.max()) if is_packed else None
    totals = BatchTotals(len(index.row_P), int(index.trained_P.sum()))
    (dealt,) = pack(index.lengths_P, budget, 1, 1, row_tokens)
    cpu = torch.device("cpu")
    return [collate(collect_rows(store, index, entries, totals, row_tokens), cpu) for entries in dealt]


def read_first(cache, topk=(), limit_bytes=2**30):
    """The store and the index that a run makes of a cache before its first step."""
    reading = FirstReading(cache, ("teacher",), topk, limit_bytes)
    assert len(list(reading)) == len(cache.shards)
    index = index_cache(cache, ("teacher",), topk, parts=reading.parts)
    return reading.store(index), index
