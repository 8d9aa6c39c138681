"""The attention that students are trained with on a GPU, on a CPU: flex attention runs there uncompiled."""

import json

import pytest
import torch
from host_reads import NoHostReads
from model_families import FAMILIES, make_model
from torch.overrides import TorchFunctionMode

from lightopd.models.causal_attention import ATTENTION, causal_mask, packed_mask, use_causal_attention
from lightopd.models.head import last_hidden

CPU = torch.device("cpu")
SHARED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 0]])
"""Positions of rows that sequences share; the last token of each is what a row has left over."""
IDS = torch.arange(24).view(2, 12) * 7 % 31 + 1


class Masks(TorchFunctionMode):
    """The mask and the promise of causality of every call of PyTorch's fused attention."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.found.append((options["attn_mask"], options["is_causal"]))
        return function(*arguments, **(options or {}))


def llama():
    model = make_model("Llama")
    assert use_causal_attention(model)
    return model


def hidden_and_gradients(model, **inputs):
    model.zero_grad()
    hidden_BTD = last_hidden(model, input_ids=IDS, use_cache=False, **inputs)
    hidden_BTD.float().square().sum().backward()
    return hidden_BTD.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_rows_of_one_sequence_reach_the_fused_kernels_without_a_mask_and_give_the_same_bits():
    expected = hidden_and_gradients(make_model("Llama"))
    model = llama()
    with Masks() as masks:
        found = hidden_and_gradients(model, attention_mask=causal_mask(CPU))
    assert masks.found
    assert set(masks.found) == {(None, True)}
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("is_mixed", [False, True])
@torch.no_grad()  # flex attention has gradients on a GPU only: tests/gpu
def test_sequences_that_share_rows_give_what_a_mask_of_every_pair_gives(is_mixed):
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        expected = last_hidden(make_model("Llama"), input_ids=IDS, position_ids=SHARED, use_cache=False)
        model = llama()
        inputs = {"position_ids": SHARED, "attention_mask": packed_mask(SHARED), "use_cache": False}
        # What a GPU compiles is run as it is written.
        with torch.compiler.set_stance("force_eager"), Masks() as masks:
            found = last_hidden(model, input_ids=IDS, **inputs)
    assert masks.found == []
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if is_mixed else 1e-5)


def test_making_a_mask_waits_for_no_device():
    with NoHostReads():
        packed_mask(SHARED)
        causal_mask(CPU)


def test_no_sequence_sees_another():
    sees, places = packed_mask(SHARED).mask_mod, torch.arange(12)
    found_BTT = torch.stack(
        [torch.stack([sees(row, 0, place, places) for place in places]) for row in (0, 1)]
    )
    sequence_BT = (SHARED == 0).cumsum(1)
    is_same_BTT = sequence_BT[:, :, None] == sequence_BT[:, None]
    assert torch.equal(found_BTT, is_same_BTT & torch.ones(12, 12, dtype=torch.bool).tril())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_switched_only_where_nothing_changes(name):
    expected = last_hidden(make_model(name), input_ids=IDS, use_cache=False)
    model = make_model(name)
    if use_causal_attention(model):
        assert torch.equal(last_hidden(model, input_ids=IDS, attention_mask=causal_mask(CPU)), expected)
    else:
        assert model.config._attn_implementation != ATTENTION


def test_generation_and_what_is_saved_do_not_know_of_it(tmp_path):
    model = llama()
    prompts = {"input_ids": IDS[:, :5], "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(**prompts, **options), make_model("Llama").generate(**prompts, **options)
    )
    model.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
