"""The transformers engine against dense float64 references, on tiny random models of many families."""

# R = response tokens, T = positions, V = vocabulary; nats throughout

import numpy as np
import pytest
import torch
from engine_cases import (
    CONTEXT,
    FAMILIES,
    VOCABULARY,
    hf_engine,
    loaded_model,
    random_ids,
    random_sequences,
    tiny_model,
)
from fake_engine import exact_scores
from transformers import AutoModelForCausalLM, DynamicCache

from lightopd.engines.base import random_stream
from lightopd.engines.hf import head_scores
from lightopd.engines.hf.kv_cache import new_cache
from lightopd.engines.hf.shared_prompts import prompts_can_be_shared
from lightopd.engines.kinds import describe_engine, load_engine
from lightopd.errors import EngineError
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig
from lightopd.schemas.records import Sequence

MIXED = [(3, 7), (20, 1), (1, 12), (9, 30), (20, 2), (2, 9), (12, 20)]
FULL_ATTENTION = ["llama", "qwen3", "gpt2", "phi", "granite"]


def own_logits(model, sequence):
    """The model's own logits of each response token, float64 [R, V], one sequence at a time, no padding."""
    ids = np.concatenate([sequence.prompt_ids, sequence.response_ids])
    with torch.no_grad():
        logits_TV = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return logits_TV.double().numpy()[len(sequence.prompt_ids) - 1 : -1]


def groups_of_three(seed=0, prompt_lengths=(30, 11, 22)):
    random = np.random.default_rng(seed)
    prompts = [random_ids(random, length) for length in prompt_lengths]
    return [Sequence(prompt, random_ids(random, length)) for prompt in prompts for length in (4, 9, 1)]


def count_inputs(model, run):
    """Tokens that went through the embedding while `run` ran, padding included, and the rows of each pass."""
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape))
    )
    run()
    hook.remove()
    return sum(rows * width for rows, width in shapes), shapes


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_equal_a_dense_softmax_in_float64(family):
    model = tiny_model(family)
    engine = hf_engine(model, batch_tokens=100)
    sequences = random_sequences(1, MIXED) + groups_of_three()
    for sequence, score in zip(sequences, engine.score(sequences, 10), strict=True):
        exact = exact_scores(own_logits(model, sequence), sequence.response_ids, 10, 0.0)
        np.testing.assert_allclose(score.logprobs, exact.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(score.topk_logprobs, exact.topk_logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(score.tail_logprobs, exact.tail_logprobs, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(score.topk_ids, exact.topk_ids)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_generation_in_a_padded_batch_equals_dense_runs(family):
    model = tiny_model(family)
    engine = hf_engine(model, generate_rollouts=8)
    random = np.random.default_rng(0)
    prompts = [random_ids(random, length) for length in (3, 25, 1, 14, 14)]
    sampling = SamplingConfig(max_tokens=15, top_p=0.97)
    samples = engine.generate(prompts, sampling, [str(i) for i in range(5)], [7, 8, 9, 10])
    for prompt, sample in zip(prompts, samples, strict=True):
        logits_RV = own_logits(model, Sequence(prompt, sample.response_ids))
        exact = exact_scores(logits_RV, sample.response_ids, VOCABULARY, 0.0)
        np.testing.assert_allclose(sample.logprobs, exact.logprobs, rtol=0, atol=1e-5)
        whole_RV = exact.topk_logprobs.reshape(-1, VOCABULARY).astype(np.float64)
        np.testing.assert_allclose(sample.entropies, -(np.exp(whole_RV) * whole_RV).sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_a_shared_prompt_gives_the_same_scores_for_fewer_tokens(family):
    model = tiny_model(family)
    shared, plain = hf_engine(model, batch_tokens=200), hf_engine(model, batch_tokens=200)
    plain._share_prompts = False
    sequences = groups_of_three()
    first, second = shared.score(sequences, 5), plain.score(sequences, 5)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.topk_logprobs, two.topk_logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.tail_logprobs, two.tail_logprobs, rtol=0, atol=1e-5)
    shared_tokens, _ = count_inputs(model, lambda: shared.score(sequences, 5))
    plain_tokens, _ = count_inputs(model, lambda: plain.score(sequences, 5))
    assert shared_tokens < 0.7 * plain_tokens


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_prompts_are_not_shared_under_a_sliding_window(family):
    assert not prompts_can_be_shared(loaded_model(tiny_model(family)))


def test_a_window_too_wide_to_show_in_a_trial_is_seen_all_the_same():
    config = FAMILIES["mistral"]()
    config.sliding_window = CONTEXT - 1
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not prompts_can_be_shared(loaded_model(model))


@pytest.mark.parametrize("lost", ["position_ids", "attention_mask"])
def test_prompts_are_not_shared_by_a_model_that_sharing_would_change(lost):
    model = tiny_model("llama")
    assert prompts_can_be_shared(loaded_model(model))

    def forget(module, inputs, named):
        return inputs, {**named, lost: None}

    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    assert not prompts_can_be_shared(loaded_model(model))
    shared, plain = hf_engine(model, batch_tokens=200), hf_engine(tiny_model("llama"), batch_tokens=200)
    for one, two in zip(shared.score(groups_of_three(), 0), plain.score(groups_of_three(), 0), strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=1e-5)


def test_a_group_with_short_prompts_runs_plain():
    model = tiny_model("llama")
    engine = hf_engine(model)
    prompt = random_ids(np.random.default_rng(0), 2)
    group = [Sequence(prompt, sequence.response_ids) for sequence in random_sequences(2, [(1, 30)] * 4)]
    _, shapes = count_inputs(model, lambda: engine.score(group, 0))
    assert shapes == [(4, 31)]


def test_batches_stay_within_the_token_budget_and_waste_little():
    model = tiny_model("llama")
    engine = hf_engine(model, batch_tokens=80)
    sequences = random_sequences(3, [(1 + i % 9, 1 + (7 * i) % 23) for i in range(40)])
    tokens, shapes = count_inputs(model, lambda: engine.score(sequences, 0))
    assert all(rows * width <= 80 for rows, width in shapes)
    real = sum(len(s.prompt_ids) + len(s.response_ids) - 1 for s in sequences)
    assert real <= tokens < 1.1 * real


def test_small_slices_of_logits_change_nothing(monkeypatch):
    model = tiny_model("phi")
    sequences = random_sequences(1, MIXED)
    whole = hf_engine(model).score(sequences, 5)
    monkeypatch.setitem(head_scores.PRODUCT_BYTES, "cpu", 4 * VOCABULARY * 5)
    monkeypatch.setitem(head_scores.SLICE_BYTES, "cpu", 4 * VOCABULARY * 2)
    for one, two in zip(whole, hf_engine(model).score(sequences, 5), strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(one.topk_ids, two.topk_ids)
        np.testing.assert_allclose(one.tail_logprobs, two.tail_logprobs, rtol=0, atol=1e-6)


def test_the_growing_cache_holds_what_the_cache_of_transformers_holds():
    model = tiny_model("llama")
    growing, plain = new_cache(model), DynamicCache(config=model.config)
    torch.manual_seed(0)
    num_rows = 3
    for width, rows in [(7, None), (1, [2, 0]), (40, None), (1, [1, 1, 0, 0, 1]), (2, None)]:
        for layer in range(2):
            keys, values = torch.randn(2, num_rows, 2, width, 8)
            one, two = growing.update(keys, values, layer), plain.update(keys, values, layer)
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        if rows is not None:
            num_rows = len(rows)
            for cache in (growing, plain):
                cache.reorder_cache(torch.tensor(rows))
    assert growing.get_seq_length() == plain.get_seq_length() == 51


def test_a_step_of_generation_copies_no_cache():
    cache = new_cache(tiny_model("llama"))
    states = torch.randn(2, 1, 2, 10, 8)
    cache.update(*states, 0)
    places = {cache.update(*states[:, :, :, :1], 0)[0].data_ptr() for _ in range(20)}
    assert len(places) == 1


def test_a_prompt_is_run_once_for_its_whole_group():
    model = tiny_model("llama")
    prompt = random_ids(np.random.default_rng(0), 20)
    engine = hf_engine(model, generate_rollouts=16)
    keys = [str(i) for i in range(10)]
    tokens, shapes = count_inputs(
        model, lambda: engine.generate([prompt] * 10, SamplingConfig(max_tokens=4), keys, [])
    )
    assert shapes == [(1, 20), (10, 1), (10, 1), (10, 1)]
    assert tokens == 50


def test_finished_rows_leave_the_batch():
    model = tiny_model("llama")
    engine = hf_engine(model, generate_rollouts=64)
    prompt = random_ids(np.random.default_rng(0), 4)
    samples = []
    _, shapes = count_inputs(
        model,
        lambda: samples.extend(
            engine.generate(
                [prompt] * 64, SamplingConfig(max_tokens=40), [str(i) for i in range(64)], list(range(12))
            )
        ),
    )
    rows = [shape[0] for shape in shapes[1:]]
    running = [sum(len(sample.response_ids) > step for sample in samples) for step in range(1, len(rows) + 1)]
    assert running[0] > running[-1] > 0
    for held, needed in zip(rows, running, strict=True):
        assert needed <= held < needed / 0.75 + 1


def test_a_row_at_the_end_of_its_context_does_not_stop_the_others():
    engine = hf_engine(tiny_model("gpt2"), generate_rollouts=8)
    random = np.random.default_rng(0)
    prompts = [random_ids(random, length) for length in (CONTEXT - 2, 3, 4, 5, 6, 7)]
    samples = engine.generate(prompts, SamplingConfig(max_tokens=20), list("abcdef"), [])
    assert [len(sample.response_ids) for sample in samples] == [2, 20, 20, 20, 20, 20]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)])
def test_first_tokens_are_drawn_as_often_as_their_probability_says(temperature, top_p):
    model = tiny_model("llama")
    prompt = random_ids(np.random.default_rng(0), 5)
    count = 4000
    samples = hf_engine(model, generate_rollouts=count).generate(
        [prompt] * count,
        SamplingConfig(max_tokens=1, temperature=temperature, top_p=top_p),
        [f"k{i}" for i in range(count)],
        [],
    )
    (logits_V,) = own_logits(model, Sequence(prompt, prompt[:1]))
    expected_V = np.exp(logits_V / temperature - (logits_V / temperature).max())
    expected_V /= expected_V.sum()
    order_V = np.argsort(-expected_V)
    expected_V[order_V[np.cumsum(expected_V[order_V]) - expected_V[order_V] >= top_p]] = 0
    expected_V /= expected_V.sum()
    found_V = np.bincount([sample.response_ids[0] for sample in samples], minlength=VOCABULARY)
    assert (found_V[expected_V == 0] == 0).all()
    inside = expected_V > 0
    chi2 = ((found_V - count * expected_V)[inside] ** 2 / (count * expected_V[inside])).sum()
    freedom = inside.sum() - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)
    if top_p < 1:
        assert inside.sum() < VOCABULARY
        assert found_V[inside].min() > 0


def test_every_token_is_drawn_with_the_next_number_of_its_rows_stream():
    model = tiny_model("llama")
    prompt = random_ids(np.random.default_rng(0), 5)
    (sample,) = hf_engine(model).generate([prompt], SamplingConfig(max_tokens=12, seed=3), ["p0/4"], [])
    logits_RV = own_logits(model, Sequence(prompt, sample.response_ids))
    cumulative_RV = np.exp(logits_RV - logits_RV.max(1, keepdims=True)).cumsum(1)
    uniforms_R = random_stream(3, "p0/4").random(12)
    expected = (cumulative_RV <= uniforms_R[:, None] * cumulative_RV[:, -1:]).sum(1)
    assert sample.response_ids.tolist() == expected.tolist()


def poisoned_model():
    """A Llama whose logits are NaN right after token 7."""
    model = tiny_model("llama")
    seen = []

    def remember(module, inputs):
        seen.append(inputs[0])

    def poison(module, inputs, output_BTD):
        return output_BTD.masked_fill((seen[-1] == 7)[..., None], torch.nan)

    model.get_input_embeddings().register_forward_pre_hook(remember)
    model.model.norm.register_forward_hook(poison)
    return model


def test_nan_logits_end_scoring_with_the_place():
    good, bad = np.array([3, 4, 5], dtype=np.int32), np.array([8, 9, 7, 9, 9], dtype=np.int32)
    with pytest.raises(EngineError, match="sequence 1 at response position 3"):
        hf_engine(poisoned_model()).score(
            [Sequence(good, good), Sequence(good, bad), Sequence(good, good)], 4
        )


def test_infinite_logits_end_scoring_with_the_place():
    model = tiny_model("phi")
    with torch.no_grad():
        model.lm_head.bias[5] = torch.inf
    good = np.array([3, 4, 6], dtype=np.int32)
    with pytest.raises(EngineError, match="sequence 0 at response position 0"):
        hf_engine(model).score([Sequence(good, good)], 4)


def test_nan_logits_end_generation_with_key_and_position():
    prompts = [np.array([3, 4], dtype=np.int32), np.array([3, 7], dtype=np.int32)]
    with pytest.raises(EngineError, match="rollout b/1 at response position 0"):
        hf_engine(poisoned_model()).generate(prompts, SamplingConfig(max_tokens=4), ["a/0", "b/1"], [])


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_lack_of_memory_names_the_setting_to_lower(failure):
    model = tiny_model("llama")
    engine = hf_engine(model, batch_tokens=1000, generate_rollouts=32)

    def fail(module, inputs):
        raise failure

    model.register_forward_pre_hook(fail)
    model.model.register_forward_pre_hook(fail)
    with pytest.raises(EngineError, match=r"batch_tokens, now 1000, to 500"):
        engine.score(random_sequences(0, [(3, 3)]), 0)
    with pytest.raises(EngineError, match=r"generate_rollouts, now 32, to 16"):
        engine.generate([np.array([3], dtype=np.int32)], SamplingConfig(), ["k"], [])


def test_another_runtime_error_is_not_taken_for_lack_of_memory():
    model = tiny_model("llama")
    engine = hf_engine(model)

    def fail(module, inputs):
        raise RuntimeError("shapes do not fit")

    model.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        engine.score(random_sequences(0, [(3, 3)]), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_engine_is_what_its_description_says(tmp_path, dtype):
    tiny_model("qwen3").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    settings, model = HfEngine(device="cpu"), ModelConfig(path=str(tmp_path))
    engine = load_engine(settings, model)
    record, precision = describe_engine(settings, model)
    assert (record.kind, record.settings["device"]) == ("hf", "cpu")
    assert precision.dtype == dtype == str(engine._loaded.model.dtype).removeprefix("torch.")
    assert (engine.vocabulary_size, engine.context_length) == (VOCABULARY, CONTEXT)


def test_half_precision_weights_get_logits_that_are_not_rounded_to_half(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    engine = load_engine(HfEngine(device="cpu"), ModelConfig(path=str(tmp_path)))
    model = engine._loaded.model
    (sequence,) = random_sequences(0, [(6, 20)])
    (score,) = engine.score([sequence], 5)
    ids = np.concatenate([sequence.prompt_ids, sequence.response_ids[:-1]]).astype(np.int64)
    with torch.no_grad():
        hidden_TD = model.model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0]
    logits_TV = hidden_TD.double() @ model.lm_head.weight.detach().double().T
    exact = exact_scores(logits_TV.numpy()[5:], sequence.response_ids, 5, 0.0)
    np.testing.assert_allclose(score.logprobs, exact.logprobs, rtol=0, atol=1e-5)


def test_a_closed_engine_frees_its_model():
    engine = hf_engine(tiny_model("llama"))
    engine.close()
    assert engine._loaded is None
