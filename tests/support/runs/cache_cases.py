"""Small caches with known content: distributions drawn from a seed, scores computed from them in float64."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from lightopd.cache.manifests import rollouts_folder, signal_folder
from lightopd.cache.shards import write_shard
from lightopd.cache.signals.horizon import scored_length
from lightopd.cache.store import Cache, create_cache, create_signal, open_cache
from lightopd.cache.tables import rollout_id, rollouts_to_table, scores_to_table, split_lists
from lightopd.schemas.cache import ROLLOUTS, SCHEMA_VERSION
from lightopd.schemas.configs import SamplingConfig
from lightopd.schemas.manifest import (
    CacheManifest,
    ModelFingerprint,
    SftLineage,
    SignalManifest,
    TokenizerFingerprint,
)
from lightopd.schemas.records import Rollout, RolloutSignal

VOCABULARY = 48
END = 1
LENGTHS = ((5, 1, 9), (3, 12))
"""Response lengths of the usual case: two shards."""

TEACHER = ModelFingerprint(identity="teacher", weights="w", config="c", source="teachers/big")
STUDENT = ModelFingerprint(identity="student", weights="v", config="c", source="students/small")


def cache_manifest(num_shards: int = len(LENGTHS), **changes: object) -> CacheManifest:
    fields = {
        "schema_version": SCHEMA_VERSION,
        "lightopd_version": "0.0",
        "origin": "student",
        "sampler": STUDENT,
        "precision": None,
        "sft": SftLineage(proof="recorded", teacher=TEACHER),
        "tokenizer": TokenizerFingerprint(
            vocabulary="map", size=VOCABULARY, special_ids={"eos": [END]}, template=None
        ),
        "vocabulary_size": VOCABULARY,
        "sampling": SamplingConfig(),
        "prompts": "prompts",
        "num_prompts": 5,
        "shard_rollouts": 3,
        "num_shards": num_shards,
        "engine": None,
    }
    return CacheManifest.model_validate({**fields, **changes})


def signal_manifest(name: str, rollouts: CacheManifest, **changes: object) -> SignalManifest:
    fields = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "role": "teacher",
        "rollouts": rollouts.fingerprint(),
        "model": TEACHER,
        "precision": None,
        "tokenizer": rollouts.tokenizer,
        "top_k": 4,
        "topk_dtype": "float16",
        "tail": "exact",
        "engine": None,
    }
    return SignalManifest.model_validate({**fields, **changes})


def make_rollout(rng: np.random.Generator, length: int, **changes: object) -> Rollout:
    """A rollout of `length` tokens that ends with the end token."""
    response = rng.integers(2, VOCABULARY, length).astype(np.int32)
    response[length - 1 :] = END
    prompt = rng.integers(2, VOCABULARY, int(rng.integers(1, 6))).astype(np.int32)
    fields = {
        "rollout_id": rollout_id(prompt, response, STUDENT.identity, 0),
        "prompt_id": f"prompt-{prompt.tobytes().hex()}",
        "sample_index": 0,
        "origin": "student",
        "domain": str(rng.choice(["sums", "words"])),
        "prompt_ids": prompt,
        "response_ids": response,
        "loss_mask": rng.random(length) < 0.8,
        "turns": np.sort(rng.integers(0, 2, length)).astype(np.int32),
        "logprobs": -rng.exponential(1, length).astype(np.float32),
        "entropies": rng.exponential(1, length).astype(np.float32),
        "finish_reason": "stop",
        "truncated": False,
        "answer": "42",
        "reward": 0.5,
        "prompt_text": "how many?",
        "response_text": "forty-two",
    }
    return Rollout(**{**fields, **changes})  # type: ignore[arg-type]


def make_scores(
    rng: np.random.Generator, response_ids: np.ndarray, top_k: int, min_probability: float = 0.0
) -> RolloutSignal:
    """Exact scores of random distributions, the top-k cut at `min_probability`."""
    logits_NV = 3 * rng.normal(size=(len(response_ids), VOCABULARY))
    logprobs_NV = logits_NV - np.log(np.exp(logits_NV).sum(axis=1, keepdims=True))
    order_NV = np.argsort(-logprobs_NV, axis=1)
    sorted_NV = np.take_along_axis(logprobs_NV, order_NV, axis=1)
    is_kept_NV = (np.arange(VOCABULARY) < top_k) & (np.exp(sorted_NV) >= min_probability)
    outside_N = np.where(is_kept_NV, 0, np.exp(sorted_NV)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tails_N = np.log(outside_N)
    return RolloutSignal(
        logprobs=logprobs_NV[np.arange(len(response_ids)), response_ids].astype(np.float32),
        topk_counts=is_kept_NV.sum(axis=1).astype(np.int32),
        topk_ids=order_NV[is_kept_NV].astype(np.int32),
        topk_logprobs=sorted_NV[is_kept_NV].astype(np.float32),
        tail_logprobs=tails_N.astype(np.float32),
    )


def cut_scores(scores: RolloutSignal, length: int) -> RolloutSignal:
    """The scores of a response's first tokens."""
    entries = int(scores.topk_counts[:length].sum())
    return RolloutSignal(
        logprobs=scores.logprobs[:length],
        topk_counts=scores.topk_counts[:length],
        topk_ids=scores.topk_ids[:entries],
        topk_logprobs=scores.topk_logprobs[:entries],
        tail_logprobs=scores.tail_logprobs[:length],
    )


def write_rollouts(path: Path, shards: Sequence[Sequence[Rollout]], **changes: object) -> Cache:
    """A cache of the given rollouts, with no signal."""
    counted = {"num_prompts": sum(len(rollouts) for rollouts in shards)}
    manifest = cache_manifest(len(shards), **counted | changes)
    create_cache(path, manifest)
    for index, rollouts in enumerate(shards):
        table = rollouts_to_table(rollouts)
        write_shard(rollouts_folder(path), index, table, kind="rollouts", fingerprint=manifest.fingerprint())
    return open_cache(path)


def write_signal(
    cache: Cache, name: str, shards: Sequence[Sequence[tuple[str, RolloutSignal]]], **changes: object
) -> Cache:
    """The cache with a signal of the given (rollout id, scores) added."""
    manifest = signal_manifest(name, cache.manifest, **changes)
    create_signal(cache, manifest)
    folder = signal_folder(cache.path, name)
    for index, rows in enumerate(shards):
        table = scores_to_table([row for row, _ in rows], [scores for _, scores in rows], manifest.topk_dtype)
        write_shard(folder, index, table, kind=f"signals/{name}", fingerprint=manifest.fingerprint())
    return open_cache(cache.path)


def make_cache(
    path: Path,
    signals: Mapping[str, Mapping[str, object]] | None = None,
    lengths: Sequence[Sequence[int]] = LENGTHS,
) -> tuple[Cache, list[list[Rollout]], dict[str, list[list[RolloutSignal]]]]:
    """A sound cache and the records in it; `signals` are names with changes to their manifests."""
    rng = np.random.default_rng(7)
    rollouts = [[make_rollout(rng, length) for length in shard] for shard in lengths]
    cache = write_rollouts(path, rollouts)
    written: dict[str, list[list[RolloutSignal]]] = {}
    for name, changes in ({"teacher": {}} if signals is None else signals).items():
        settings = signal_manifest(name, cache.manifest, **changes)
        written[name] = [
            [
                cut_scores(
                    make_scores(rng, row.response_ids, settings.top_k, settings.min_probability),
                    scored_length(settings.horizon, len(row.response_ids)),
                )
                for row in shard
            ]
            for shard in rollouts
        ]
        rows = [
            [(row.rollout_id, scores) for row, scores in zip(*pair, strict=True)]
            for pair in zip(rollouts, written[name], strict=True)
        ]
        cache = write_signal(cache, name, rows, **changes)
    return cache, rollouts, written


def table_to_rollouts(table: pa.Table) -> list[Rollout]:
    """Rows of a `ROLLOUTS` table as records; arrays are read-only views into the table's buffers."""
    columns = {
        field.name: split_lists(table.column(field.name))
        if pa.types.is_list(field.type)
        else table.column(field.name).to_pylist()
        for field in ROLLOUTS
    }
    return [Rollout(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def table_to_scores(table: pa.Table) -> list[RolloutSignal]:
    """Rows of a `SIGNALS` table as records; arrays are read-only views into the table's buffers."""
    columns = {name: split_lists(table.column(name)) for name in table.column_names if name != "rollout_id"}
    return [
        RolloutSignal(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]
