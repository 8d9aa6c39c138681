"""Scoring keeps the device at work: nothing is waited for before the next batch is under way."""

import numpy as np
import pytest
import torch
from host_reads import NoHostReads
from model_families import make_model

from lightopd.engines.hf import score as hf_score
from lightopd.engines.hf.memory import HEAD_BYTES, fitting_tokens, free_bytes
from lightopd.engines.hf.score import ScoreSettings, score
from lightopd.models.causal_attention import use_causal_attention
from lightopd.models.head import head_of
from lightopd.models.load import LoadedModel
from lightopd.schemas.records import Sequence, Support

CPU = torch.device("cpu")
LENGTHS = (3, 9, 5, 1, 7)


def loaded(*, on_gpu=False):
    model = make_model("Qwen3").eval()
    assert not on_gpu or use_causal_attention(model)
    return LoadedModel(model, head_of(model), CPU, 64)


def sequences(*, with_support=False):
    random = np.random.default_rng(0)
    found = []
    for length in LENGTHS:
        ids = random.integers(1, 64, 4 + length).astype(np.int32)
        counts = np.full(length, 2, dtype=np.int32)
        support = Support(counts, np.tile(np.array([3, 5], dtype=np.int32), length)) if with_support else None
        found.append(Sequence(ids[:4], ids[4:], support=support))
    return found


@pytest.mark.parametrize("with_support", [False, True])
@torch.inference_mode()
def test_no_batch_is_read_on_the_host_before_its_scores_are_wanted(with_support):
    settings, asked = ScoreSettings(4, 0.0, 16, False), sequences(with_support=with_support)
    model = loaded(on_gpu=True)
    with NoHostReads():
        made = list(hf_score._scored(model, asked, range(5), settings))
    assert len(made) > 2
    assert sorted(index for members, _ in made for index in members) == list(range(5))


@pytest.mark.parametrize("with_support", [False, True])
def test_scores_as_on_a_gpu_are_the_same_bits(with_support):
    settings, asked = ScoreSettings(4, 0.0, 16, False), sequences(with_support=with_support)
    here, there = score(loaded(), asked, settings), score(loaded(on_gpu=True), asked, settings)
    for one, other in zip(here, there, strict=True):
        for name in ("logprobs", "topk_counts", "topk_ids", "topk_logprobs", "tail_logprobs"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_a_batch_is_waited_for_when_the_next_one_is_under_way():
    told = []

    class Pending:
        def __init__(self, number):
            self.number = number
            told.append(f"begun {number}")

        def arrived(self):
            told.append(f"waited for {self.number}")
            return self.number

    found = list(hf_score._one_behind(([number], Pending(number)) for number in range(3)))
    assert found == [([0], 0), ([1], 1), ([2], 2)]
    assert told == ["begun 0", "begun 1", "waited for 0", "begun 2", "waited for 1", "waited for 2"]
    assert list(hf_score._one_behind(iter(()))) == []


def test_a_batch_is_no_larger_than_free_memory():
    model = make_model("Qwen3")
    a_token = (12 * 32 + 4 * 64) * 4
    assert fitting_tokens(model, HEAD_BYTES + 100 * a_token) == 100
    assert fitting_tokens(model.to(torch.bfloat16), HEAD_BYTES + 100 * a_token) == 200
    assert fitting_tokens(model, 0) == 1
    assert free_bytes(CPU) is None


def test_free_memory_decides_where_it_is_less_than_the_setting(monkeypatch):
    shapes = []
    monkeypatch.setattr(hf_score, "free_bytes", lambda device: 0)
    model = loaded()
    model.model.get_decoder().register_forward_pre_hook(
        lambda _, arguments, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    score(model, sequences(), ScoreSettings(4, 0.0, 10_000, False))
    assert [rows for rows, _ in shapes] == [1] * len(LENGTHS)
