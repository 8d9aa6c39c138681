"""Accuracy by hand, and KL against dense softmaxes in float64."""

import numpy as np
import pytest
import torch
from tiny_models import save_model

from lightopd.errors import InputError
from lightopd.models.load import load_model
from lightopd.schemas.configs import HfEngine, ModelConfig
from lightopd.schemas.records import Sequence
from lightopd.training.measures.evaluation import accuracy, divergence


def test_prompts_count_equally_and_pass_needs_one_full_reward():
    measured = accuracy(["a", "a", "a", "a", "b", "b"], [1.0, 0.0, 0.0, 0.0, 0.5, 0.5])
    assert measured.avg_at_k == pytest.approx((0.25 + 0.5) / 2)
    assert measured.pass_at_k == 0.5
    assert measured.standard_error == pytest.approx(np.std([0.25, 0.5], ddof=1) / np.sqrt(2))


def test_rows_without_a_reward_are_left_out_and_none_is_no_accuracy():
    assert accuracy(["a", "b"], [1.0, None]).avg_at_k == 1.0
    assert accuracy(["a", "b"], [None, None]) is None


def sequences():
    random = np.random.default_rng(0)
    lengths = [(5, 7), (2, 0), (9, 1), (3, 12), (6, 6)]
    return [Sequence(*(random.integers(3, 20, n).astype(np.int32) for n in pair)) for pair in lengths]


def dense(folder, sequence):
    model = load_model(ModelConfig(path=str(folder)), "cpu")
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    return logits[len(sequence.prompt_ids) - 1 : len(ids) - 1].log_softmax(-1)


@pytest.mark.parametrize("batch_tokens", [1, 24, 10_000])
def test_divergence_is_the_mean_kl_over_response_positions_in_both_directions(tmp_path, batch_tokens):
    student, teacher = save_model(tmp_path / "s", 1, layers=1), save_model(tmp_path / "t", 2)
    reverse, forward = [], []
    for sequence in sequences():
        if len(sequence.response_ids):
            s, t = dense(student, sequence), dense(teacher, sequence)
            reverse += (s.exp() * (s - t)).sum(-1).tolist()
            forward += (t.exp() * (t - s)).sum(-1).tolist()
    found = divergence(
        ModelConfig(path=str(student)),
        ModelConfig(path=str(teacher)),
        sequences(),
        HfEngine(device="cpu", batch_tokens=batch_tokens),
    )
    assert found.num_tokens == len(reverse) == 26
    assert found.reverse_kl_nats == pytest.approx(np.mean(reverse), abs=1e-6)
    assert found.forward_kl_nats == pytest.approx(np.mean(forward), abs=1e-6)


@pytest.mark.parametrize("widths", [(24, 32), (32, 24)])
def test_models_of_two_widths_are_compared_on_the_ids_that_both_have(tmp_path, widths):
    folders = [save_model(tmp_path / str(seed), seed, vocabulary=width) for seed, width in enumerate(widths)]
    reverse, forward, outside = [], [], []
    for sequence in sequences():
        if len(sequence.response_ids):
            whole = [dense(folder, sequence) for folder in folders]
            s, t = (logits[:, :24].log_softmax(-1) for logits in whole)
            reverse += (s.exp() * (s - t)).sum(-1).tolist()
            forward += (t.exp() * (t - s)).sum(-1).tolist()
            outside += sum(logits[:, 24:].exp().sum(-1) for logits in whole).tolist()
    configs = [ModelConfig(path=str(folder)) for folder in folders]
    found = divergence(*configs, sequences(), HfEngine(device="cpu"))
    assert found.reverse_kl_nats == pytest.approx(np.mean(reverse), abs=1e-6)
    assert found.forward_kl_nats == pytest.approx(np.mean(forward), abs=1e-6)
    assert found.outside_mass == pytest.approx(np.mean(outside), abs=1e-6)
    assert found.outside_mass > 0.01


def test_answers_without_a_token_are_refused(tmp_path):
    config = ModelConfig(path=str(save_model(tmp_path / "a", 1)))
    with pytest.raises(InputError, match="no response tokens"):
        divergence(config, config, sequences()[1:2], HfEngine(device="cpu"))
