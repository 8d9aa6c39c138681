"""Tiny random models of many families, and the engines that the contract is tested on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from fake_engine import FakeEngine
from fake_vllm_server import FakeServer
from tiny_models import tokenizer

from lightopd.engines.base import Engine
from lightopd.engines.hf.engine import TransformersEngine, load_hf_engine
from lightopd.engines.stop_strings import StopStrings
from lightopd.engines.vllm.server import load_server_engine
from lightopd.models.head import head_of
from lightopd.models.load import LoadedModel, context_length_of
from lightopd.schemas.configs import HfEngine, ModelConfig, ServerEngine
from lightopd.schemas.records import Sequence

VOCABULARY, CONTEXT = 97, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "smollm2": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=16),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SIZES, **MOE, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8),
    "phi": lambda: hf.PhiConfig(**SIZES),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "granite": lambda: hf.GraniteConfig(**SIZES, logits_scaling=2.0),
    "cohere": lambda: hf.CohereConfig(**SIZES, logit_scale=0.5),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=8),
}


def tiny_model(family: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random model of a family, in float32; equal arguments are equal weights."""
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def loaded_model(model: hf.PreTrainedModel) -> LoadedModel:
    return LoadedModel(model, head_of(model), torch.device("cpu"), context_length_of(model))


def hf_engine(model: hf.PreTrainedModel, **settings: int) -> TransformersEngine:
    """An engine over a model in memory, without the checks of loading."""
    return TransformersEngine(
        loaded_model(model),
        HfEngine(device="cpu", **settings),
        StopStrings(ModelConfig(path="in memory")),
    )


def random_ids(random: np.random.Generator, length: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    return random.integers(0, vocabulary, size=length).astype(np.int32)


def random_sequences(
    seed: int, shapes: list[tuple[int, int]], vocabulary: int = VOCABULARY
) -> list[Sequence]:
    """Random sequences of the given (prompt, response) lengths."""
    random = np.random.default_rng(seed)
    return [
        Sequence(random_ids(random, prompt, vocabulary), random_ids(random, response, vocabulary))
        for prompt, response in shapes
    ]


@dataclass(frozen=True)
class EngineCase:
    """An engine under the contract."""

    build: Callable[[Path], Engine]
    """Makes the engine; the folder is its own to write a model into."""
    floor_nats: float
    """Largest difference between two scorings of one token that counts as rounding."""
    marks: tuple[pytest.MarkDecorator, ...] = ()
    """Markers of what it needs."""


def _build_fake(folder: Path) -> Engine:
    return FakeEngine(seed=3, vocabulary_size=VOCABULARY, context_length=CONTEXT)


def _build_hf(folder: Path) -> Engine:
    tiny_model("qwen3").save_pretrained(folder)
    small_batches = HfEngine(device="cpu", batch_tokens=100, generate_rollouts=4)
    return load_hf_engine(small_batches, ModelConfig(path=str(folder)))


def _build_server(folder: Path) -> Engine:
    """The engine `server` over a server of the toy model."""
    tiny_model("qwen3").save_pretrained(folder)
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    server = FakeServer(FakeEngine(seed=3, vocabulary_size=VOCABULARY, context_length=CONTEXT), tokens)
    return Outliving(
        load_server_engine(ServerEngine(urls=server.url), ModelConfig(path=str(folder))), server.stop
    )


def _build_vllm(folder: Path) -> Engine:
    """One engine for the session: what starts it takes longer than all its tests."""
    from vllm_cases import shared_engine

    return Outliving(shared_engine(folder.parent), None)


def _build_vllm_server(folder: Path) -> Engine:
    from vllm_cases import shared_server

    server = shared_server(folder.parent)
    model = ModelConfig(path=str(folder.parent / "model"))
    return load_server_engine(ServerEngine(urls=server.url), model)


class Outliving:
    """An engine whose `close` also stops what was started for it, or that outlives its tests with None."""

    def __init__(self, engine: Engine, stop: Callable[[], None] | None) -> None:
        self._engine, self._stop = engine, stop

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def close(self) -> None:
        if self._stop is not None:
            self._engine.close()
            self._stop()


ENGINES = {
    "fake": EngineCase(_build_fake, floor_nats=1e-6),
    "hf": EngineCase(_build_hf, floor_nats=1e-5),
    "server": EngineCase(_build_server, floor_nats=1e-6),
    "vllm": EngineCase(_build_vllm, floor_nats=1e-5, marks=(pytest.mark.vllm,)),
    "vllm server": EngineCase(_build_vllm_server, floor_nats=1e-5, marks=(pytest.mark.vllm,)),
}


def behavior_logprobs(scores, response_ids, sampling):
    """Of each drawn id under temperature and top-p, in float64, from scores of the whole vocabulary."""
    ends = np.cumsum(scores.topk_counts)[:-1]
    pairs = zip(np.split(scores.topk_ids, ends), np.split(scores.topk_logprobs, ends), strict=True)
    found = []
    for (ids, logprobs), drawn in zip(pairs, response_ids, strict=True):
        scaled = logprobs.astype(np.float64) / (sampling.temperature or 1)
        probabilities = np.exp(scaled - np.logaddexp.reduce(scaled))
        is_kept = np.cumsum(probabilities) - probabilities < sampling.top_p
        value = np.log(probabilities[ids == drawn][0] / probabilities[is_kept].sum())
        found.append(value if sampling.temperature else 0.0)
    return np.array(found)
