"""The estimate of a run's memory against what autograd keeps on a CPU."""

from dataclasses import replace

import pytest
import torch
from model_families import FAMILIES, make_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightopd.schemas.finetune import FinetuneConfig
from lightopd.training.data.sizes import CachedSizes
from lightopd.training.student.memory import (
    GIB,
    Memory,
    MemoryEstimate,
    estimate_memory,
    measure_saved,
    saved_bytes,
)

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_activations_are_estimated_to_15_percent_of_what_is_kept(precision, recompute):
    student = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).train()
    finetune = FinetuneConfig(precision=precision)
    estimated = saved_bytes(student, finetune, (2, 96), recompute=recompute)
    if precision == "bf16-true":
        student.to(torch.bfloat16)
    if recompute:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    ids_BT = torch.zeros(2, 96, dtype=torch.int64)
    kept = measure_saved(student, ids_BT, is_mixed=precision == "bf16-mixed")
    assert estimated == pytest.approx(kept, rel=0.15)


def test_weights_gradients_and_moments_are_counted_exactly():
    student = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    student.model.layers[0].requires_grad_(False)
    found = estimate_memory(student, FinetuneConfig(precision="bf16-true", micro_batch_tokens=64), 32)
    total = sum(each.numel() for each in student.parameters())
    trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
    assert (found.weights, found.gradients, found.moments) == (2 * total, 2 * trained, 2 * trained)


def test_the_sentence_says_what_memory_goes_to_and_whether_it_fits():
    estimate = MemoryEstimate(3 * GIB, 2 * GIB, GIB, GIB, GIB, 0)
    assert estimate.sentence(Memory("the GPU", 9 * GIB)) == (
        "estimated memory: 8.0 GiB (weights 3.0, gradients 2.0, moments 1.0, activations 1.0, kernel 1.0, "
        "cache 0), which fits into the 9.0 GiB of the GPU"
    )
    assert "does not fit" in estimate.sentence(Memory("the GPU", 7 * GIB))
    unknown = replace(estimate, activations=None).sentence(Memory("the GPU", 9 * GIB))
    assert unknown.startswith("estimated memory: at least 7.0 GiB")
    assert "activations unknown" in unknown


def test_every_family_is_estimated_or_says_that_it_cannot_be():
    known = [name for name in FAMILIES if estimate_memory(make_model(name), FinetuneConfig(), 8).activations]
    assert set(known) >= {"Llama", "Qwen3", "Gemma3", "Phi", "Phi3", "GPT2", "Granite"}


def test_shards_divide_what_is_kept_between_steps():
    student = LlamaForCausalLM(LlamaConfig(**SIZES))
    whole = estimate_memory(student, FinetuneConfig(), 32)
    share = estimate_memory(student, FinetuneConfig(strategy="fsdp", devices=4), 32)
    assert 4 * share.moments == whole.moments
    assert share.activations == whole.activations


def test_columns_of_the_cache_grow_with_its_support():
    student = LlamaForCausalLM(LlamaConfig(**SIZES))
    finetune = FinetuneConfig(micro_batch_tokens=64)
    read = (CachedSizes(), CachedSizes(entries=10), CachedSizes(hidden=48, heads=4096))
    none, support, hidden = (estimate_memory(student, finetune, 32, each).cache for each in read)
    assert support - none == 64 * 10 * 28
    assert hidden - none == 64 * 48 * 6 + 4096
