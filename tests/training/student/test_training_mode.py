"""Training mode changes nothing: what a student says is what it says in evaluation mode, every time."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lightopd.errors import TrainingError
from lightopd.models.head import last_hidden
from lightopd.training.student.training_mode import prepare_student

IDS = torch.arange(24).view(2, 12)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, attention_dropout=0.5)


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class NoisyEmbedding(torch.nn.Embedding):
    """Adds noise in training mode, as NEFTune does."""

    def forward(self, ids):
        embedded = super().forward(ids)
        return embedded + 0.1 * torch.randn_like(embedded) if self.training else embedded


class NormalisedMLP(LlamaMLP):
    """With statistics of the batch in training mode."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = torch.nn.BatchNorm1d(config.hidden_size)

    def forward(self, x):
        return self.norm(super().forward(x).transpose(1, 2)).transpose(1, 2)


class BlindMLP(LlamaMLP):
    """Without gradient in evaluation mode and with noise in training mode, as some models' own code is."""

    def forward(self, x):
        if self.training:
            return super().forward(x + torch.rand_like(x))
        with torch.no_grad():
            return super().forward(x)


def with_mlp(kind):
    model = make(LLAMA)
    for layer in model.model.layers:
        layer.mlp = kind(LLAMA)
    return model


def with_noise():
    model = make(LLAMA)
    noisy = NoisyEmbedding(64, 32)
    noisy.weight = model.model.embed_tokens.weight
    model.model.embed_tokens = noisy
    return model


MODELS = {
    "attention dropout": lambda: make(LLAMA),
    "router jitter": lambda: make(
        MixtralConfig(
            **SMALL,
            intermediate_size=48,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            router_jitter_noise=0.4,
        )
    ),
    "dropped layers": lambda: make(
        OPTConfig(**SMALL, ffn_dim=48, layerdrop=0.001, dropout=0.1, word_embed_proj_dim=32)
    ),
    "noise": with_noise,
    "batch statistics": lambda: with_mlp(NormalisedMLP),
}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS.keys())
def test_training_and_evaluation_mode_say_the_same_and_train_the_same_weights(make_model, recomputes):
    plain = make_model().eval()
    expected_BTD = last_hidden(plain, input_ids=IDS, use_cache=False)
    reached = {name for name, _ in plain.named_parameters()}
    student = prepare_student(make_model(), gradient_checkpointing=recomputes)
    for _ in range(2):
        found_BTD = last_hidden(student, input_ids=IDS, use_cache=False)
        torch.testing.assert_close(found_BTD, expected_BTD, rtol=1e-5, atol=1e-6)
    found_BTD.square().sum().backward()
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert without <= {"lm_head.weight"} & reached


def test_dropout_alone_needs_no_evaluation_mode():
    student = prepare_student(make(LLAMA), gradient_checkpointing=False)
    assert all(module.training for module in student.modules())
    assert {layer.self_attn.attention_dropout for layer in student.model.layers} == {0.0}


def test_layers_still_recompute_where_the_student_stays_in_evaluation_mode():
    student = prepare_student(MODELS["router jitter"](), gradient_checkpointing=True)
    assert [layer.training for layer in student.model.layers] == [True, True]
    assert not any(layer.mlp.training for layer in student.model.layers)


def test_a_student_with_no_such_mode_is_refused_before_the_first_step():
    with pytest.raises(TrainingError, match="says something else in training than in evaluation mode"):
        prepare_student(with_mlp(BlindMLP), gradient_checkpointing=False)
