"""The real vLLM, in process and as a server that these tests start, stop and kill.

What holds for every engine is in `test_engine_contract.py`, which runs on both as well.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from cache_cases import table_to_scores
from engine_cases import random_sequences, tiny_model
from safetensors.torch import load_file, save_file
from tiny_models import tokenizer, write_prompts
from vllm_cases import RealServer, Unclosed, save_vllm_model, shared_engine, shared_server

from lightopd.cache.manifests import signal_folder
from lightopd.cache.shards import shard_path
from lightopd.cache.store import open_cache
from lightopd.config import load_stage
from lightopd.engines.kinds import describe_engine, load_engine
from lightopd.engines.noise import measure_noise
from lightopd.engines.stop_strings import StopReader
from lightopd.engines.vllm.in_process import load_vllm_engine
from lightopd.engines.vllm.server import load_server_engine
from lightopd.errors import ConfigError, EngineError
from lightopd.pipelines import precompute, rollout
from lightopd.schemas.configs import HfEngine, ModelConfig, SamplingConfig, ServerEngine, VllmEngine
from lightopd.schemas.records import Sequence

pytestmark = pytest.mark.vllm

SHAPES = [(3, 7), (20, 1), (1, 12), (9, 30), (20, 2), (34, 30), (5, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The session's own folder, where the shared model lies."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def engine(folder):
    return shared_engine(folder)


@pytest.fixture(scope="module")
def model(engine, folder):
    return ModelConfig(path=str(folder / "model"))


@pytest.fixture(scope="module")
def reference(model):
    return load_engine(HfEngine(device="cpu"), model)


def assert_agree(found, exact, nats=1e-4):
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=nats)
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, rtol=0, atol=nats)
        np.testing.assert_allclose(ours.tail_logprobs, theirs.tail_logprobs, rtol=0, atol=nats)


def test_scores_are_those_of_transformers_in_float32(engine, reference):
    sequences = random_sequences(1, SHAPES, engine.vocabulary_size)
    for top_k in (0, 5, engine.vocabulary_size):
        assert_agree(engine.score(sequences, top_k), reference.score(sequences, top_k))


def test_a_sequence_longer_than_a_pass_is_scored_in_parts(engine, reference):
    sequences = random_sequences(2, [(2, 62)] * 12, engine.vocabulary_size)
    assert_agree(engine.score(sequences, 3), reference.score(sequences, 3))


def test_requests_that_do_not_fit_into_memory_together_wait(engine, monkeypatch):
    sequences = random_sequences(3, SHAPES, engine.vocabulary_size)
    together = engine.score(sequences, 5)
    monkeypatch.setattr("lightopd.engines.vllm.requests.IN_FLIGHT_BYTES", 1)
    assert_agree(engine.score(sequences, 5), together, 1e-5)


def test_the_noise_of_float32_is_rounding(engine):
    noise = measure_noise(engine, random_sequences(4, SHAPES, engine.vocabulary_size))
    assert noise.tokens > 50
    assert noise.max_nats < 1e-5


def test_vllm_draws_from_the_models_distribution(engine, reference):
    """2,000 first tokens after one prompt come as often as they should, within five deviations."""
    prompt = np.array([3, 40, 7], dtype=np.int32)
    count = 2000
    samples = engine.generate(
        [prompt] * count, SamplingConfig(max_tokens=1), [f"p/{i}" for i in range(count)], ()
    )
    drawn = np.bincount([sample.response_ids[0] for sample in samples], minlength=engine.vocabulary_size)
    (scores,) = reference.score(
        [dataclasses.replace(random_sequences(0, [(3, 1)])[0], prompt_ids=prompt)], 97
    )
    expected = np.zeros(engine.vocabulary_size)
    expected[scores.topk_ids] = np.exp(scores.topk_logprobs)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(drawn / count - expected) <= 5 * deviation + 1 / count).all()


def assert_ends_at_texts(engine, reference):
    prompts = [np.array([3 + row, 40, 7], np.int32) for row in range(12)]
    keys, sampling = [str(row) for row in range(12)], SamplingConfig(max_tokens=40, stop=("1", "=", "+2"))
    samples = engine.generate(prompts, sampling, keys, [2])
    at_texts = 0
    for prompt, sample in zip(prompts, samples, strict=True):
        reader = StopReader(tokenizer(), sampling.stop, prompt)
        ends = [reader.is_end(token) for token in sample.response_ids]
        assert not any(ends[:-1])
        assert sample.finish_reason == ("stop" if ends[-1] or sample.response_ids[-1] == 2 else "length")
        at_texts += ends[-1]
    assert at_texts > 1
    sequences = [Sequence(p, s.response_ids) for p, s in zip(prompts, samples, strict=True)]
    for sample, scores in zip(samples, reference.score(sequences, 0), strict=True):
        np.testing.assert_allclose(sample.logprobs, scores.logprobs, rtol=0, atol=1e-4)


def test_texts_end_a_response_in_process(engine, reference):
    assert_ends_at_texts(engine, reference)


def test_texts_end_a_response_of_a_server(folder, model, reference):
    client = load_server_engine(ServerEngine(urls=[shared_server(folder).url]), model)
    try:
        assert_ends_at_texts(client, reference)
    finally:
        client.close()


def test_the_description_names_vllm_and_the_precision(model):
    record, precision = describe_engine(VllmEngine(kv_cache_gib=0.1, batch_tokens=128), model)
    assert record.kind == "vllm"
    assert precision.dtype == "float32"


def test_settings_that_do_not_fit_the_model_are_refused_before_vllm_starts(model):
    with pytest.raises(ConfigError, match="the model's context is 64"):
        load_vllm_engine(VllmEngine(max_model_len=65), model)


def test_a_model_whose_heads_the_cpu_cannot_run_is_refused_before_vllm_starts(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="have 16 values"):
        load_vllm_engine(VllmEngine(), ModelConfig(path=str(tmp_path)))


def test_a_temperature_that_vllm_would_change_is_refused(engine):
    with pytest.raises(ConfigError, match=r"sampling\.temperature"):
        engine.generate([np.array([3], np.int32)], SamplingConfig(temperature=0.001), ["k"], ())


def save_adapter(folder, base):
    """A LoRA adapter of rank 4 on the query and down projections, and the merged model beside it."""
    torch.manual_seed(5)
    weights = load_file(base / "model.safetensors")
    adapter, merged = {}, dict(weights)
    for name in list(weights):
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            continue
        rows, columns = weights[name].shape
        down, up = torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1
        stem = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        merged[name] = weights[name] + 2.0 * up @ down
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    }
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    shutil.copytree(base, folder / "merged")
    save_file(merged, folder / "merged" / "model.safetensors", metadata={"format": "pt"})


def test_an_adapter_scores_as_the_merged_model_does(tmp_path):
    base = save_vllm_model(tmp_path / "base")
    save_adapter(tmp_path, base)
    sequences = random_sequences(6, SHAPES)
    settings = VllmEngine(kv_cache_gib=0.1)
    adapted = load_vllm_engine(settings, ModelConfig(path=str(base), adapter=tmp_path / "adapter"))
    try:
        found = adapted.score(sequences, 5)
        handler = adapted._client.output_handler
    finally:
        adapted.close()
    assert handler.cancelled(), "vLLM told of its own end as of a crash"
    merged = load_engine(HfEngine(device="cpu"), ModelConfig(path=str(tmp_path / "merged")))
    plain = load_engine(HfEngine(device="cpu"), ModelConfig(path=str(base)))
    assert_agree(found, merged.score(sequences, 5), 1e-3)
    assert np.abs(found[0].logprobs - plain.score(sequences[:1], 5)[0].logprobs).max() > 0.1


@pytest.fixture(scope="module")
def cache(folder, model):
    """Rollouts of the shared model over 12 prompts in three shards, to be copied before they are scored."""
    path = folder / "served-cache"
    prompts = write_prompts(folder / "served-prompts.jsonl", 12)
    asked = {"student": model.path, "prompts": prompts, "cache": path}
    rollout.run(load_stage("rollout", [], ["sampling.max_tokens=10", "shard_rollouts=4"], asked))
    return path


def score_cache(cache, model, tmp_path, engine, load=load_engine):
    """Precompute into a copy of the cache; scores of every shard."""
    if not tmp_path.exists():
        shutil.copytree(cache, tmp_path)
    asked = {"cache": tmp_path, "teacher": model.path, "role": "reference", "engine": engine}
    precompute.run(load_stage("precompute", [], ["topk_dtype=float32", "top_k=5"], asked), load=load)
    return signal_folder(tmp_path, "teacher")


def read_scores(folder, cache):
    import pyarrow.parquet as pq

    return [
        scores
        for shard in open_cache(cache).shards
        for scores in table_to_scores(pq.read_table(shard_path(folder, shard)))
    ]


def test_the_cache_is_the_same_within_1e_4_whichever_engine_scored_it(cache, model, engine, folder, tmp_path):
    server = shared_server(folder)
    exact = score_cache(cache, model, tmp_path / "hf", {"kind": "hf"})
    ours = score_cache(cache, model, tmp_path / "vllm", {"kind": "vllm"}, lambda *_: Unclosed(engine))
    served = score_cache(cache, model, tmp_path / "server", {"kind": "server", "urls": server.url})
    exact_scores = read_scores(exact, cache)
    assert_agree(read_scores(ours, cache), exact_scores)
    assert_agree(read_scores(served, cache), exact_scores)
    manifests = [json.loads((path / "signal.json").read_text()) for path in (exact, ours, served)]
    assert [manifest["tail"] for manifest in manifests] == ["exact", "derived", "derived"]
    assert [manifest["engine"]["kind"] for manifest in manifests] == ["hf", "vllm", "server"]


class KilledAfterOneShard(Unclosed):
    """Kills the server once the first shard is scored and the second is asked for."""

    def __init__(self, engine, server):
        super().__init__(engine)
        self._server, self._shards = server, 0

    def score(self, sequences, top_k, min_probability=0.0):
        if top_k:
            self._shards += 1
        if self._shards == 2:
            self._server.kill()
        return self._engine.score(sequences, top_k, min_probability)

    def close(self):
        self._engine.close()


def test_a_run_goes_on_after_its_server_was_killed(cache, model, folder, tmp_path):
    doomed, path = RealServer(folder / "model", VLLM_ALLOW_LONG_MAX_MODEL_LEN="1"), tmp_path / "cache"
    settings = {"kind": "server", "urls": doomed.url, "attempts": 2}
    try:
        with pytest.raises(EngineError, match="no reply from"):
            score_cache(
                cache, model, path, settings, lambda *asked: KilledAfterOneShard(load_engine(*asked), doomed)
            )
    finally:
        doomed.kill()
    first = shard_path(signal_folder(path, "teacher"), 0)
    before = (first.read_bytes(), first.stat().st_mtime_ns)
    assert not shard_path(signal_folder(path, "teacher"), 1).exists()
    scored = []

    def counting(*asked):
        made = load_engine(*asked)
        score = made.score
        made.score = lambda sequences, top_k, *rest: (scored.append(top_k), score(sequences, top_k, *rest))[1]
        return made

    settings = {"kind": "server", "urls": shared_server(folder).url}
    done = score_cache(cache, model, path, settings, counting)
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert len([top_k for top_k in scored if top_k]) == 2
    undisturbed = score_cache(cache, model, tmp_path / "undisturbed", settings)
    for shard in range(3):
        assert shard_path(done, shard).read_bytes() == shard_path(undisturbed, shard).read_bytes()


def test_a_real_server_of_another_model_or_tokenizer_is_refused(folder, tmp_path):
    server = shared_server(folder)
    other = save_vllm_model(tmp_path / "other", seed=1)
    with pytest.raises(EngineError, match="is another model than"):
        load_server_engine(ServerEngine(urls=server.url), ModelConfig(path=str(other)))
