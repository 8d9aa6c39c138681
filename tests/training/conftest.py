"""A tiny student, a tiny teacher, and caches that the student sampled and the teacher scored."""

# T = positions of one rollout, V = vocabulary

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks
from text_columns import write_confidences, write_continuations, write_shown
from training_runs import CALM, read_first
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.shards import write_shard
from lightopd.cache.store import create_cache, create_signal, open_cache
from lightopd.cache.tables import rollout_id, rollouts_to_table, scores_to_table
from lightopd.schemas.cache import SCHEMA_VERSION
from lightopd.schemas.configs import ModelConfig
from lightopd.schemas.finetune import FinetuneConfig
from lightopd.schemas.manifest import (
    CacheManifest,
    JoinedCache,
    ModelFingerprint,
    SftLineage,
    SignalManifest,
)
from lightopd.schemas.objectives.objective import ObjectiveConfig
from lightopd.schemas.records import Rollout, RolloutSignal
from lightopd.training.fit import fit

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


NOBODY = ModelFingerprint(identity="", weights="", config="", source="")


@pytest.fixture(autouse=True)
def _one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks():
    """Function that calls `fit` in one process for each device; see `Ranks`."""
    nursery = Ranks()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(timeout=60)


def save_model(folder, model):
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"stand-in": True}))
    return folder


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    """Qwen3 with a tied head, hidden size 32, two layers, 64 tokens."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)
    return save_model(tmp_path_factory.mktemp("models") / "student", Qwen3ForCausalLM(config))


@pytest.fixture(scope="session")
def teacher():
    """Llama with an untied head over the same tokens."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()


@pytest.fixture(scope="session")
def make_cache(student_folder, teacher):
    """Function that writes a cache and opens it."""
    student = Qwen3ForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()

    def make(path, num_rollouts=22, per_shard=8, top_k=4, change=lambda rollout: rollout, **manifest):
        rollouts = [make_rollout(student, index) for index in range(num_rollouts)]
        scores = [score(teacher, rollout, top_k) for rollout in rollouts]
        changed = [change(rollout) for rollout in rollouts]
        return write_cache(Path(path), changed, scores, per_shard, top_k, **manifest)

    return make


@pytest.fixture
def cache(make_cache, tmp_path):
    return make_cache(tmp_path / "cache")


@pytest.fixture
def train(cache, student_folder, tmp_path):
    """Function that trains into a folder of the test."""

    def run(out="out", objective=(), cache=cache, student=student_folder, staleness=None, **settings):
        defaults = {
            "steps": 6,
            "batch_sequences": 8,
            "micro_batch_tokens": 60,
            "optimizer": CALM,
            "checkpoint_every": 3,
        }
        finetune = FinetuneConfig(**(defaults | settings))
        config = ObjectiveConfig(**dict(objective))
        return fit(
            cache, ModelConfig(path=str(student)), tmp_path / out, finetune, config, staleness=staleness
        )

    return run


@pytest.fixture(scope="session")
def data(make_cache, tmp_path_factory):
    """A store over 22 rollouts of 3 to 19 tokens, and its index."""
    cache = make_cache(tmp_path_factory.mktemp("data") / "cache")
    return read_first(cache, ("teacher",))


def make_rollout(student, index):
    """Random tokens of a random length, with the student's own log-probabilities; two a prompt."""
    numbers = np.random.default_rng([index, 7])
    prompt = np.random.default_rng(index // 2).integers(1, VOCABULARY, size=2 + index // 2 % 5)
    prompt_ids = prompt.astype(np.int32)
    response_ids = numbers.integers(1, VOCABULARY, size=int(numbers.integers(1, 14))).astype(np.int32)
    logprobs_TV = response_logprobs(student, prompt_ids, response_ids)
    mask = np.ones(len(response_ids), dtype=bool)
    mask[2:4] = len(mask) < 6
    return Rollout(
        rollout_id=rollout_id(prompt_ids, response_ids, "student", index),
        prompt_id=f"prompt-{index // 2}",
        sample_index=index % 2,
        origin="student",
        domain="even" if index % 2 == 0 else None,
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        loss_mask=mask,
        turns=np.where(np.arange(len(mask)) < 4, 0, 1).astype(np.int32),
        logprobs=logprobs_TV[np.arange(len(mask)), response_ids],
        entropies=-(np.exp(logprobs_TV) * logprobs_TV).sum(1),
        finish_reason="stop",
        truncated=index % 3 == 0,
        answer=None,
        reward=None if index % 4 == 0 else float(index % 2),
        prompt_text=None,
        response_text=None,
    )


@torch.no_grad()
def response_logprobs(model, prompt_ids, response_ids):
    """Log-probabilities [response tokens, V] by a plain forward pass of one sequence."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids])).long()[None]
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits_TV.float().log_softmax(-1).numpy()


def score(model, rollout, top_k):
    """The model's scores, with supports of uneven width."""
    logprobs_TV = response_logprobs(model, rollout.prompt_ids, rollout.response_ids)
    counts = np.minimum(top_k, 1 + np.arange(len(logprobs_TV)) % max(1, top_k)).astype(np.int32)
    order_TV = np.argsort(-logprobs_TV, axis=1, kind="stable")
    kept = [order[:count] for order, count in zip(order_TV, counts, strict=True)]
    values = [row[ids] for row, ids in zip(logprobs_TV, kept, strict=True)]
    tails = [np.log1p(-np.exp(value.astype(np.float64)).sum()) for value in values]
    return RolloutSignal(
        logprobs=logprobs_TV[np.arange(len(logprobs_TV)), rollout.response_ids],
        topk_counts=counts,
        topk_ids=np.concatenate(kept).astype(np.int32),
        topk_logprobs=np.concatenate(values).astype(np.float32),
        tail_logprobs=np.array(tails, dtype=np.float32),
    )


def write_cache(
    path, rollouts, scores, per_shard, top_k, origin="student", vocabulary_size=VOCABULARY, rows_origin=None
):
    """Write rollouts and scores: a list for the signal `teacher`, or a dict of lists."""
    starts = range(0, len(rollouts), per_shard)
    manifest = CacheManifest(
        schema_version=SCHEMA_VERSION,
        lightopd_version="0",
        origin=origin,
        sampler=None,
        precision=None,
        sft=SftLineage(proof="unknown"),
        tokenizer=None,
        vocabulary_size=vocabulary_size,
        sampling=None,
        prompts="prompts",
        num_prompts=len(rollouts),
        shard_rollouts=per_shard,
        num_shards=len(starts),
        engine=None,
    )
    if origin == "mixed":
        sources = [
            JoinedCache(origin=who, sampler=NOBODY, content=who, source=who) for who in ("student", "teacher")
        ]
        manifest = manifest.model_copy(update={"joined": tuple(sources)})
    create_cache(path, manifest)
    origins = [row.origin if rows_origin == "kept" else origin for row in rollouts]
    own = [as_cached(*row, index) for index, row in enumerate(zip(rollouts, origins, strict=True))]
    for index, start in enumerate(starts):
        table = rollouts_to_table(own[start : start + per_shard])
        write_shard(rollouts_folder(path), index, table, kind="rollouts", fingerprint=manifest.fingerprint())
    signals = scores if isinstance(scores, dict) else {"teacher": scores}
    for name, scored in signals.items():
        write_signal(path, manifest, name, own, scored, top_k)
    return open_cache(path)


def as_cached(rollout, origin, index):
    """The rollout as a sound cache has it: named by its content, in step with its own columns."""
    return replace(
        rollout,
        origin=origin,
        sample_index=index,
        rollout_id=rollout_id(rollout.prompt_ids, rollout.response_ids, "", index),
        finish_reason="length" if rollout.truncated else "stop",
    )


def write_signal(path, manifest, name, rollouts, scores, top_k):
    per_shard = manifest.shard_rollouts
    signal = SignalManifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        role="teacher",
        rollouts=manifest.fingerprint(),
        model=None,
        precision=None,
        tokenizer=None,
        top_k=top_k,
        min_probability=1e-9,
        topk_dtype="float16" if name == "rounded" else "float32",
        tail="exact",
        engine=None,
    )
    create_signal(open_cache(path, incomplete=True), signal)
    for index, start in enumerate(range(0, len(rollouts), per_shard)):
        part = rollouts[start : start + per_shard]
        ids = [rollout.rollout_id for rollout in part]
        table = scores_to_table(ids, scores[start : start + per_shard], signal.topk_dtype)
        kind, fingerprint = f"signals/{name}", signal.fingerprint()
        write_shard(signal_folder(path, name), index, table, kind=kind, fingerprint=fingerprint)


@pytest.fixture(scope="session")
def wide_caches(student_folder, tmp_path_factory):
    """Three caches with every signal and column that a shipped recipe reads, sampled by the student.

    `plain` has four rollouts of each of six prompts; `pairs` has a teacher's and a student's answer to each
    of twelve; `answers` has the teacher's own graded answers to the prompts of `plain`.
    """
    folder = tmp_path_factory.mktemp("wide")
    student = Qwen3ForCausalLM.from_pretrained(student_folder, dtype=torch.float32).eval()
    models = {"rollout_student": student, "warmup": student}
    for seed, name in enumerate(SIGNALS, start=1):
        torch.manual_seed(seed)
        models[name] = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    torch.manual_seed(1000)
    models["second_teacher"] = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    plain = [sampled(student, index // 4, index, student) for index in range(24)]
    writers = {"teacher": models["teacher"], "student": student}
    pairs = [
        replace(sampled(writers[origin], prompt, index, student), origin=origin)
        for prompt in range(12)
        for index, origin in enumerate(writers)
    ]
    answers = [
        replace(sampled(models["teacher"], prompt, prompt, student), reward=1.0) for prompt in range(6)
    ]

    def write(name, rollouts, **settings):
        scores = {signal: [score(model, one, 16) for one in rollouts] for signal, model in models.items()}
        # As precompute stores it by default; the student itself, so that every divergence from it is zero.
        scores["rounded"] = [
            replace(one, topk_logprobs=one.topk_logprobs.astype(np.float16).astype(np.float32))
            for one in scores["rollout_student"]
        ]
        cache = write_cache(folder / name, rollouts, scores, 8, 16, **settings)
        write_confidences(cache)
        write_continuations(cache)
        write_shown(cache)
        return cache

    return {
        "plain": write("plain", plain),
        "pairs": write("pairs", pairs, origin="imported", rows_origin="kept"),
        "answers": write_cache(folder / "answers", answers, {}, 8, 0, origin="teacher"),
    }


EXPOSURES = tuple(f"exposure_{level}" for level in range(5))
SIGNALS = ("teacher", "reference", "privileged", "negative", "dpo", "reverse_dpo", "code_teacher", *EXPOSURES)


@torch.no_grad()
def sampled(writer, prompt, index, student):
    """Eight tokens drawn from `writer` after a prompt of three, in two turns, with a reward and a domain."""
    draw = torch.Generator().manual_seed(1000 * prompt + index)
    prompt_ids = np.random.default_rng(prompt).integers(1, VOCABULARY, size=3).astype(np.int32)
    ids_BT = torch.from_numpy(prompt_ids).long()[None]
    for _ in range(8):
        probabilities = writer(input_ids=ids_BT, use_cache=False).logits[0, -1].softmax(-1)
        ids_BT = torch.cat([ids_BT, torch.multinomial(probabilities, 1, generator=draw)[None]], dim=1)
    response_ids = ids_BT[0, 3:].numpy().astype(np.int32)
    logprobs_TV = response_logprobs(student, prompt_ids, response_ids)
    return replace(
        make_rollout(student, index),
        rollout_id=rollout_id(prompt_ids, response_ids, "student", 1000 * prompt + index),
        prompt_id=f"prompt-{prompt}",
        sample_index=index,
        domain=("math", "code", None)[prompt % 3],
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        loss_mask=np.ones(8, dtype=bool),
        turns=(np.arange(8) // 4).astype(np.int32),
        logprobs=logprobs_TV[np.arange(8), response_ids],
        entropies=-(np.exp(logprobs_TV) * logprobs_TV).sum(1),
        reward=float((index + prompt) % 3 != 0),
    )
