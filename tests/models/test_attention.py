"""The attention a model is run with is the model's, or it is refused."""

import numpy as np
import pytest
import torch
import transformers as hf
from engine_cases import FAMILIES, SIZES, hf_engine, random_ids, random_sequences, tiny_model
from transformers import AutoModelForCausalLM

from lightopd.engines.hf.engine import load_hf_engine
from lightopd.engines.hf.probe import check_engine
from lightopd.errors import ConfigError, EngineError, InputError
from lightopd.models.attention import attention_of
from lightopd.models.limits import context_length_in, model_limits, rope_switch_in
from lightopd.models.load import load_model
from lightopd.models.probe import check_attention, probe_rows
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig
from lightopd.schemas.records import Sequence

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.05, 1.1, 1.2],
    "long_factor": [1.5, 3.0, 8.0, 20.0],
    "original_max_position_embeddings": 32,
}
MADE = {
    "capped": lambda: hf.Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=2.0, sliding_window=8),
    "sinks": lambda: hf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, sliding_window=8),
    "alibi": lambda: hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, seq_length=64),
    "gptj": lambda: hf.GPTJConfig(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64
    ),
}


def save(folder, config, sharper=3.0):
    """A random model whose attention is sharp, so that what attention leaves out shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query_key")):
                weight.mul_(sharper)
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder))


def plain_logprobs(model, prompt_ids, response_ids):
    """Of the response, by transformers with eager attention, one sequence alone."""
    plain = AutoModelForCausalLM.from_pretrained(model.path, attn_implementation="eager").eval()
    ids = torch.tensor([*prompt_ids.tolist(), *response_ids.tolist()])
    with torch.no_grad():
        logits = plain(input_ids=ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[len(prompt_ids) :, None])[:, 0].tolist()


@pytest.mark.parametrize("name", MADE)
def test_auto_takes_an_attention_that_the_model_has_whole(tmp_path, name):
    model = save(tmp_path, MADE[name]())
    assert attention_of(model) == "eager"
    engine = load_hf_engine(HfEngine(device="cpu"), model)
    prompts = [ids.prompt_ids for ids in random_sequences(0, [(3, 1), (14, 1), (9, 1)])]
    samples = engine.generate(prompts, SamplingConfig(max_tokens=20), ["a", "b", "c"], ())
    sequences = [
        Sequence(prompt, sample.response_ids) for prompt, sample in zip(prompts, samples, strict=True)
    ]
    for sequence, sample, scores in zip(sequences, samples, engine.score(sequences, 0), strict=True):
        plain = plain_logprobs(model, sequence.prompt_ids, sequence.response_ids)
        assert sample.logprobs.tolist() == pytest.approx(plain, abs=1e-4)
        assert scores.logprobs.tolist() == pytest.approx(plain, abs=1e-4)


def test_auto_is_the_fused_attention_for_other_models(tmp_path):
    model = save(tmp_path, FAMILIES["qwen3"]())
    assert attention_of(model) == "sdpa"
    assert load_model(model, "cpu").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", MADE)
def test_an_attention_that_is_not_the_models_is_refused_with_the_remedy(tmp_path, name):
    model = save(tmp_path, MADE[name]()).model_copy(update={"attention": "sdpa"})
    with pytest.raises(ConfigError, match="set attention to auto or eager"):
        load_hf_engine(HfEngine(device="cpu"), model)


def test_a_family_that_is_another_model_under_the_fused_attention_is_refused(tmp_path):
    """Falcon with ALiBi chooses its attention when it is built; the two differ in transformers itself."""
    config = hf.FalconConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        initializer_range=0.3,
    )
    model = save(tmp_path, config)
    with pytest.raises(EngineError, match="set the model's attention to eager"):
        load_hf_engine(HfEngine(device="cpu"), model)
    with pytest.raises(EngineError, match="under attention sdpa"):
        check_attention(load_model(model, "cpu"))
    check_attention(load_model(model.model_copy(update={"attention": "eager"}), "cpu"))


@pytest.mark.parametrize("name", [*FAMILIES])
def test_families_pass_the_trial(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
    check_engine(hf_engine(model)._loaded)
    if name not in ("gemma2",):
        check_attention(model)


def test_rows_of_the_trial_lie_on_both_sides_of_a_window():
    model = AutoModelForCausalLM.from_config(FAMILIES["mistral"]())
    lengths = [len(row) for row in probe_rows(model, 97)]
    assert min(lengths) - 6 < 8 < max(lengths)


@pytest.mark.parametrize("lost", ["position_ids", "attention_mask"])
def test_generation_that_is_not_the_models_is_refused(lost):
    """Padding on the left changes a model that does not see its mask or its positions."""
    model = tiny_model("gpt2")

    def forget(module, inputs, named):
        return inputs, {**named, lost: None}

    model.transformer.register_forward_pre_hook(forget, with_kwargs=True)
    with pytest.raises(EngineError, match="in generation"):
        check_engine(hf_engine(model)._loaded)


def test_a_batch_that_is_not_the_models_is_refused():
    model = tiny_model("llama")

    def mix(module, inputs, output):
        output.last_hidden_state = (
            output.last_hidden_state - output.last_hidden_state.mean(0, keepdim=True) / 4
        )

    model.model.register_forward_hook(mix)
    with pytest.raises(EngineError, match="in a batch"):
        check_engine(hf_engine(model)._loaded)


def test_the_context_ends_where_positions_change_their_factors(tmp_path):
    config = hf.Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=32)
    model = save(tmp_path, config)
    assert model_limits(model).context_length == model_limits(model).rope_switch == 32
    engine = load_hf_engine(HfEngine(device="cpu"), model)
    prompts = [ids.prompt_ids for ids in random_sequences(0, [(3, 1), (14, 1), (29, 1)])]
    samples = engine.generate(prompts, SamplingConfig(max_tokens=30), ["a", "b", "c"], ())
    assert [len(s.response_ids) for s in samples] == [29, 18, 3]
    sequences = [
        Sequence(prompt, sample.response_ids) for prompt, sample in zip(prompts, samples, strict=True)
    ]
    for sequence, sample, scores in zip(sequences, samples, engine.score(sequences, 0), strict=True):
        plain = plain_logprobs(model, sequence.prompt_ids, sequence.response_ids)
        assert sample.logprobs.tolist() == pytest.approx(plain, abs=1e-4)
        assert scores.logprobs.tolist() == pytest.approx(plain, abs=1e-4)
    with pytest.raises(InputError, match="context holds 32"):
        engine.score([Sequence(random_ids(np.random.default_rng(0), 30), sequences[0].response_ids)], 0)


@pytest.mark.parametrize(
    ("config", "switch"),
    [
        ({"rope_parameters": LONGROPE}, 32),
        ({"rope_scaling": {**LONGROPE, "type": "su"}}, 32),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]},
                "original_max_position_embeddings": 16,
            },
            16,
        ),
        (
            {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}},
            32,
        ),
        ({"rope_parameters": {**LONGROPE, "short_factor": LONGROPE["long_factor"]}}, None),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            None,
        ),
        ({"rope_parameters": None}, None),
        ({"rope_scaling": "longrope"}, None),
    ],
)
def test_the_switch_is_read_from_every_spelling(config, switch):
    assert rope_switch_in(config) == switch
    assert context_length_in({**config, "max_position_embeddings": 64}, "it") == (switch or 64)


def test_responses_that_share_a_prompt_up_to_the_switch_are_scored_as_each_alone(tmp_path):
    config = hf.Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=32)
    engine = load_hf_engine(HfEngine(device="cpu"), save(tmp_path / "phi", config))
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 90, length).astype(np.int32) for length in (14, 24)]
    rows = [
        Sequence(prompt, random.integers(3, 90, 32 - len(prompt)).astype(np.int32))
        for prompt in prompts
        for _ in range(2)
    ]
    together = engine.score(rows, 0)
    for row, scores in zip(rows, together, strict=True):
        np.testing.assert_allclose(scores.logprobs, engine.score([row], 0)[0].logprobs, atol=1e-4)
