"""Caches whose texts try to break what shows them: script tags, control characters, a million characters."""

import json
from pathlib import Path

import numpy as np
from cache_cases import (
    END,
    VOCABULARY,
    make_rollout,
    make_scores,
    write_rollouts,
    write_signal,
)
from tokenizers import Tokenizer, decoders, models

from lightopd.cache.store import Cache
from lightopd.cache.tables import rollout_id
from lightopd.schemas.base import canonical_hash
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.manifest import ModelFingerprint, TokenizerFingerprint

SCRIPT = "</script><script>document.title='owned';window.owned=1</script>"
PIECES = [
    *(
        "<pad>",
        "<eos>",
        SCRIPT,
        "<img src=x onerror=window.owned=1>",
        "\u2028",
        "\u202e",
        "\x1b[31m",
        "\n",
        " ",
    ),
    *("{{ 7*7 }}", "]]>", "<!--", "a" * 2_000, "needle"),
]
"""The first tokens of the vocabulary; the others are words."""
LONG = 12
"""A token of 2,000 characters."""


def hostile_tokenizer(folder: Path) -> TokenizerFingerprint:
    """A tokenizer of hostile pieces, and its fingerprint."""
    words = [*PIECES, *(f"word{place} " for place in range(len(PIECES), VOCABULARY))]
    backend = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>")
    )
    backend.decoder = decoders.Fuse()
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    return TokenizerFingerprint(
        vocabulary=canonical_hash(backend.get_vocab()),
        size=VOCABULARY,
        special_ids={"eos": [END]},
        template=None,
    )


def hostile_cache(root: Path, num_rollouts: int = 12, length: int = 20) -> Cache:
    """A cache in `root/cache` with signals `teacher` and `rollout_student`.

    The second rollout has a million characters.
    """
    tokenizer = hostile_tokenizer(root / "student")
    rng = np.random.default_rng(3)
    rows = []
    for place in range(num_rollouts):
        size = 500 if place == 1 else length
        response = rng.integers(2, VOCABULARY, size).astype(np.int32)
        response[: len(PIECES) - 2] = range(2, len(PIECES))
        if place == 1:
            response[:] = LONG
        response[-1] = END
        prompt = np.array([2, 3, 5, 6, 20 + place % 20], np.int32)
        rows.append(
            make_rollout(
                rng,
                size,
                response_ids=response,
                prompt_ids=prompt,
                rollout_id=rollout_id(prompt, response, "student", place),
                sample_index=place,
                prompt_id=SCRIPT,
                domain=SCRIPT if place % 2 else "\u202eplain",
                answer=SCRIPT,
                reward=float(place % 3) / 2,
                prompt_text=SCRIPT,
                response_text=SCRIPT,
            )
        )
    student = ModelFingerprint(identity="student", weights="v", config="c", source=str(root / "student"))
    group = {"num_prompts": 1, "sampling": SamplingConfig(n=num_rollouts), "shard_rollouts": num_rollouts}
    cache = write_rollouts(root / "cache", [rows], tokenizer=tokenizer, sampler=student, **group)
    for name, role in (("teacher", "teacher"), ("rollout_student", "self")):
        scores = [(row.rollout_id, make_scores(rng, row.response_ids, 6)) for row in rows]
        cache = write_signal(cache, name, [scores], role=role, top_k=6)
    return cache


def write_run(folder: Path, steps: int = 30, *, is_finished: bool = True, cache: Path | None = None) -> Path:
    """What a run of the train stage leaves: settings, metrics, and a report when it is over."""
    folder.mkdir(parents=True)
    limits = "staleness: {max_log_ratio: 0.2, min_overlap: 0.9, max_chi2: 1.0, stop_when_stale: false}"
    target = "objective: {terms: [{target: {kind: log_ratio, clip: 3.0}}]}"
    (folder / "train.yaml").write_text(f"steps: {steps}\ncache: {cache}\n{limits}\n{target}\n")
    names = "step,loss,entropy,log_ratio,w_mean,ess,chi2,log_ratio_lost,stale,grad_norm,lr,"
    names += "tokens_per_second,seconds"
    lines = [
        f"{step},{1 / step},0.3,-0.2,1.0,{1 - step / 40},{step / 20},0.01,{int(step > 20)},1.0,1e-4,900.0,"
        f"{step}"
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.csv").write_text(
        "\n".join([names, *lines]) + "\n" + ("" if is_finished else "31,0.1,")
    )
    if is_finished:
        report = {
            "stage": "train",
            "figures": {},
            "notes": ["the cache went stale at step 21"],
            "seconds": 30.0,
        }
        (folder / "train.report.json").write_text(json.dumps(report))
    return folder
