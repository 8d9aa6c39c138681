"""Several rollouts in one row: the same losses and gradients as padded and one by one."""

import numpy as np
import pytest
import torch
from model_families import FAMILIES, make_model
from training_runs import micro_batches
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from lightopd.errors import TrainingError
from lightopd.models.head import last_hidden
from lightopd.objectives.base.batch import BatchTotals
from lightopd.objectives.loss import compute_loss
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.training.data.batches import collate, collect_rows
from lightopd.training.data.plan import pack
from lightopd.training.data.row_layout import fill, lay_out
from lightopd.training.student.forward import student_tokens
from lightopd.training.student.packed_rows import check_packing, decoder_inputs
from lightopd.training.student.training_mode import prepare_student

CPU = torch.device("cpu")
REVERSE_KL = ObjectiveConfig.model_validate({"target": {"kind": "divergence"}})


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = compute_loss(REVERSE_KL, batch.rollouts, student_tokens(model, batch, ("teacher",)))
        loss.value.backward()
        total += float(loss.value.detach())
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_padded_and_one_by_one_give_equal_losses_and_gradients(data, name, attention):
    model = prepare_student(make_model(name), gradient_checkpointing=False)
    model.set_attn_implementation(attention)
    alone = loss_and_gradients(model, micro_batches(data, 19, is_packed=False))
    assert_equal(loss_and_gradients(model, micro_batches(data, 10_000, is_packed=False)), alone)
    packed = micro_batches(data, 60, is_packed=True)
    assert sum(len(batch.input_ids_BT) for batch in packed) < 20
    assert_equal(loss_and_gradients(model, packed), alone)


def test_gradient_checkpointing_keeps_packed_rollouts_apart(data):
    plain = prepare_student(make_model("Llama"), gradient_checkpointing=False)
    recomputed = prepare_student(make_model("Llama"), gradient_checkpointing=True)
    batches = micro_batches(data, 60, is_packed=True)
    assert_equal(loss_and_gradients(recomputed, batches), loss_and_gradients(plain, batches))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_found_fit_for_packing(name):
    check_packing(make_model(name))


def test_a_model_that_carries_a_state_along_the_row_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)).eval()
    with pytest.raises(
        TrainingError, match=r"MambaForCausalLM does not keep rollouts apart .*; set layout to padded"
    ):
        check_packing(model)


def test_a_model_without_positions_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(TrainingError, match="takes no positions"):
        check_packing(model)


def test_a_model_that_ignores_where_a_rollout_begins_is_refused(monkeypatch):
    model = make_model("Llama")
    forward = model.model.forward

    def one_stream(input_ids=None, position_ids=None, **others):
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(model.model, "forward", one_stream)
    with pytest.raises(TrainingError, match="hidden states differ by"):
        check_packing(model)


def test_flash_kernels_get_one_row_with_the_same_hidden_states(data):
    model = make_model("Gemma3")
    batch = micro_batches(data, 60, is_packed=True)[0]
    with torch.no_grad():
        in_rows = last_hidden(model, use_cache=False, **decoder_inputs(model, batch)).flatten(0, 1)
        model.config._attn_implementation_internal = "flash_attention_2"
        inputs = decoder_inputs(model, batch)
        model.config._attn_implementation_internal = "sdpa"
        in_one_row = last_hidden(model, use_cache=False, **inputs)[0]
    assert inputs["input_ids"].shape == (1, batch.input_ids_BT.numel())
    torch.testing.assert_close(in_one_row, in_rows, rtol=0, atol=1e-5)


def test_positions_begin_again_with_each_rollout_and_with_what_is_left_of_a_row(data):
    store, index = data
    entries = np.argsort(-index.lengths_P, kind="stable")[[0, 15, 21]]
    batch = collate(collect_rows(store, index, entries, BatchTotals(3, 9), row_tokens=16), CPU)
    first, second, third = (int(length) for length in index.lengths_P[entries])
    left = first - second - third
    expected = [list(range(first)), [*range(second), *range(third), *range(left)]]
    assert batch.position_ids_BT.tolist() == expected


def test_rollouts_lie_end_to_end_in_the_first_row_with_room():
    layout = lay_out(np.array([9, 6, 5, 3, 4]), row_tokens=9)
    assert (layout.starts_R.tolist(), layout.num_rows, layout.width) == ([0, 9, 18, 15, 23], 3, 9)
    layout = lay_out(np.array([2, 3]))
    assert (layout.starts_R.tolist(), layout.num_rows, layout.width) == ([0, 3], 2, 3)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("budget", [26, 60, 10_000])
def test_packed_micro_batches_cover_the_step_within_the_budget(budget, world_size, group_size):
    for seed in range(20):  # Many, because first-fit has rare anomalies.
        lengths = np.random.default_rng(seed).integers(1, 14, size=48).astype(np.int32)
        dealt = pack(lengths, budget, world_size, group_size, row_tokens=13)
        every = [places for rank in dealt for places in rank]
        assert sorted(np.concatenate(every).tolist()) == list(range(48))
        assert len({len(rank) for rank in dealt}) == 1
        assert all(lay_out(lengths[places], row_tokens=13).num_padded <= budget for places in every)
        assert all(
            (places.reshape(-1, group_size) % group_size == np.arange(group_size)).all() for places in every
        )


def test_packing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(20, 400, size=(256, 1))
    micro = list(fill(lengths, 4000, row_tokens=400))
    padded = sum(lay_out(lengths[units, 0], row_tokens=400).num_padded for units in micro)
    assert padded < 1.05 * lengths.sum()
