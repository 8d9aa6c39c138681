"""Tiny random models with a real tokenizer, for tests of the stages."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHARACTERS = "0123456789+=,-*/()"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer(characters=CHARACTERS, template=TEMPLATE):
    """A character-level tokenizer with pad, eos and unk."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
    )


def save_model(folder: Path, seed: int, *, layers: int = 2, vocabulary: int = 24, tokens=None) -> Path:
    """A random model in `folder`; equal arguments are equal weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.25,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int) -> Path:
    """Sums with their answers, one JSON object a line."""
    rows = [
        {"prompt": f"{i % 7}+{i % 10}+{i}=", "answer": str(i % 7 + i % 10 + i), "id": f"p{i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def checksum(response, answer, metadata):
    """A reward that any other response is likely to change; random models answer nothing right."""
    return sum(place * ord(letter) for place, letter in enumerate(response, start=1)) % 101 / 100
