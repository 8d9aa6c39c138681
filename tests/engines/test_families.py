"""Families of models through rollout, precompute and train, held to the models' own full logits.

V = vocabulary, K = teacher's most likely tokens, T = response tokens; nats.
"""

import string

import numpy as np
import pytest
import torch
from model_families import FAMILIES, make_model
from tiny_models import CHARACTERS, tokenizer, write_prompts
from transformers import GenerationConfig

from lightopd.cache.reader import read_shard_columns
from lightopd.cache.store import open_cache
from lightopd.config import load_stage
from lightopd.pipelines import precompute, rollout, train
from lightopd.training.measures.metrics_file import read_metrics

TOP_K = 5
MAX_TOKENS = 12
TERMS = [
    {"name": "topk", "target": {"kind": "divergence", "divergence": "reverse_kl", "support": "tail"}},
    {"name": "sampled", "target": "log_ratio"},
]


def save(folder, model):
    """A model folder as the stages take it: 61 characters, `<eos>` ends a response."""
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    unused = [letter for letter in string.ascii_letters if letter not in CHARACTERS]
    tokenizer((CHARACTERS + "".join(unused))[:61]).save_pretrained(folder)
    return folder


def through_the_stages(root, student, teacher):
    """Cache and metrics of one pass: eight rollouts, the teacher's top-k, two steps over all of them."""
    prompts, cache = write_prompts(root / "prompts.jsonl", 4), root / "cache"
    sampling = ["sampling.n=2", f"sampling.max_tokens={MAX_TOKENS}", f"sft_teacher={teacher}"]
    asked = {"student": student, "prompts": prompts, "cache": cache}
    rollout.run(load_stage("rollout", [], [*sampling, "shard_rollouts=4"], asked))
    asked = {"cache": cache, "teacher": teacher, "top_k": TOP_K}
    precompute.run(load_stage("precompute", [], ["topk_dtype=float32"], asked))
    asked = {"student": student, "cache": cache, "out": root / "train", "objective": {"terms": TERMS}}
    asked |= {"steps": 2, "batch_sequences": 8, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    train.run(load_stage("train", [], ["micro_batch_tokens=50"], asked))
    return open_cache(cache), read_metrics(root / "train" / "metrics.csv")


@torch.no_grad()
def own_logprobs(model, prompt_ids, response_ids):
    """Log-probabilities of the whole vocabulary at each response token, float64 [T, V]."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids])).long()
    logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits_TV.double().log_softmax(-1)


def topk_reverse_kl(student_TV, teacher_TV):
    """Mean KL(student || teacher) over the teacher's K most likely tokens and one outcome for all others."""
    ids_TK = teacher_TV.topk(TOP_K).indices
    with_tail = []
    for logprobs_TV in (student_TV, teacher_TV):
        inside_TK = logprobs_TV.exp().gather(1, ids_TK)
        with_tail.append(torch.cat([inside_TK, 1 - inside_TK.sum(1, keepdim=True)], 1))
    student_TM, teacher_TM = with_tail
    return float((student_TM * (student_TM / teacher_TM).log()).sum(1).mean())


def sampled_token_loss(student_TV, teacher_TV, response_ids):
    """Mean of minus advantage times log-probability, the advantage cut at 10 nats."""
    picked_T1 = torch.tensor(response_ids.astype(np.int64))[:, None]
    student_T1, teacher_T1 = student_TV.gather(1, picked_T1), teacher_TV.gather(1, picked_T1)
    return float(-((teacher_T1 - student_T1).clamp(-10, 10) * student_T1).mean())


def own_losses(student, teacher, cache):
    """Both losses of the untrained student, rollout by rollout: means of each, then over all of them."""
    found = []
    for shard in cache.shards:
        columns = read_shard_columns(cache, shard)
        for row in range(len(columns.rollout_ids)):
            prompt = columns.prompt_ids_P[slice(*columns.prompt_offsets[row : row + 2])]
            response = columns.response_ids_N[slice(*columns.offsets[row : row + 2])]
            both = [own_logprobs(model, prompt, response) for model in (student, teacher)]
            found.append((topk_reverse_kl(*both), sampled_token_loss(*both, response)))
    assert len(found) == 8
    return np.mean(found, axis=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_through_all_stages_with_the_losses_of_its_own_logits(tmp_path, name):
    student, teacher = (make_model(name, seed, initializer_range=0.2) for seed in (0, 1))
    folders = (save(tmp_path / "student", student), save(tmp_path / "teacher", teacher))
    cache, metrics = through_the_stages(tmp_path, *folders)
    topk, sampled = own_losses(student, teacher, cache)
    assert topk > 0.02
    assert metrics[0]["topk/loss"] == pytest.approx(topk, abs=1e-5)
    assert metrics[0]["sampled/loss"] == pytest.approx(sampled, abs=1e-5)
    assert metrics[0]["loss"] == pytest.approx(topk + sampled, abs=2e-5)
    assert metrics[1]["topk/loss"] < metrics[0]["topk/loss"]
